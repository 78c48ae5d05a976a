"""Emptying a range that goes offline of what can move (do_migrate_range of mm/memory_hotplug.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kmm import _hugetlb, _migrate, _page_ref
from kmm.balloon_compaction import note_migrated
from kmm.gfp import gfp_zone
from kmm.hugetlb_move import mark_huge_pages, used_huge_page_across
from kmm.migrate import MigrationResult, MigrationTarget, hot_remove_target, migrate_pages
from kmm.params import MAX_ORDER, MIGRATE_MOVABLE
from kmm.trace import note, traced

if TYPE_CHECKING:
    from kmm.machine import Machine

#: So many pages move that their new records are worth huge pages of the host.
MANY_PAGES = 1 << 13
AHEAD = 1 << 20


def _warn(m: Machine, line: str, pfn: int, reason: str) -> None:
    """Log a line and the page it is about, if there were not too many just now."""
    if m.migrate_ratelimit.allows(m.clock.now):
        m.printk(line)
        m.dump_page(pfn, reason)


def _expect_targets(m: Machine, n: int, target: MigrationTarget) -> None:
    """Make the host ready for the records of the pages that n others will probably move to."""
    for zone in m.nodes[target.nid].zonelist:
        if zone.zone_idx > gfp_zone(target.gfp) or not target.nodes >> zone.nid & 1:
            continue
        pfn = zone.free_head(MAX_ORDER - 1, MIGRATE_MOVABLE)
        if pfn >= 0:
            # A huge page of the host has records of more pages than one block's.
            m.records.expect_pages(pfn, min(pfn + max(n, AHEAD), zone.zone_end_pfn))
            return


@traced
def do_migrate_range(m: Machine, start_pfn: int, end_pfn: int) -> MigrationResult:
    """Isolate what can move in a range, and move it elsewhere.

    :param start_pfn: a page that can move; end_pfn: pfn behind the range.
    :return: what became of the pages; the caller looks again for what is left.
    """
    out = m.scratch.pages(end_pfn - start_pfn)
    refused = np.zeros(10, dtype=np.uint64)
    n, bad = _migrate.isolate_range(m.memmap_engine, start_pfn, end_pfn, out, refused)
    note(m, "isolate_lru_page", n - int(np.count_nonzero(mark_huge_pages(m, out[:n]))))
    pfns = out[:n]
    across = used_huge_page_across(m, start_pfn)
    if across is not None and _hugetlb.isolate_hugetlb(m.memmap_engine, across):
        pfns = np.concatenate([np.array([across], dtype=np.uint64), pfns])
    refused = refused[: min(bad, len(refused))]
    held = [int(p) for p in refused if _page_ref.is_orphan(m.memmap_engine, int(p))]
    for pfn in refused:
        if int(pfn) in held:
            continue
        _warn(m, f"failed to isolate pfn {int(pfn):x}", int(pfn), "isolation failed")
    if not len(pfns):
        return _warn_of_held(m, held, MigrationResult())
    target = hot_remove_target(m, int(pfns[0]))
    if n >= MANY_PAGES:
        _expect_targets(m, n, target)
    result = migrate_pages(m, pfns, target)
    if m.balloons:
        note_migrated(m, *result.moved())
    for pfn in result.left[:10]:
        _warn(
            m, f"migrating pfn {int(pfn):x} failed ret:{result.ret}", int(pfn), "migration failure"
        )
    return _warn_of_held(m, held, result)


def _warn_of_held(m: Machine, held: list[int], result: MigrationResult) -> MigrationResult:
    """Tell of pages without a user that are pinned, which stay as others that are held do."""
    for pfn in held:
        _warn(m, f"migrating pfn {pfn:x} failed ret:{len(held)}", pfn, "migration failure")
    if held:
        m.count_vm_event("pgmigrate_fail", len(held))
        result.left = np.concatenate([result.left, np.array(held, dtype=np.uint64)])
        result.nr_failed += len(held)
    return result
