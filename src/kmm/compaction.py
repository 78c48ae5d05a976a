"""Compaction (mm/compaction.c), which is not modelled yet: no page of the model can move."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kmm.mmzone import Zone
from kmm.trace import traced

if TYPE_CHECKING:
    from kmm.machine import Machine

COMPACT_SKIPPED, COMPACT_DEFERRED, COMPACT_CONTINUE, COMPACT_COMPLETE = 1, 2, 4, 5
COMPACT_PARTIAL_SKIPPED, COMPACT_CONTENDED, COMPACT_SUCCESS = 6, 7, 8
_EXTFRAG_THRESHOLD = 500
_GFP_OF_ZONE = (0x1, 0x4, 0x0, 0xA, 0xA)


def fragmentation_index(zone: Zone, order: int) -> int:
    """Return -1000 if a zone has a block, else how far fragmentation is to blame, 0 to 1000."""
    counts = zone.nr_free()
    if any(counts[order:]):
        return -1000
    blocks = sum(counts)
    if not blocks:
        return 0
    free = sum(n << o for o, n in enumerate(counts))
    return 1000 - (1000 + free * 1000 // (1 << order)) // blocks


def compaction_suitable(
    m: Machine,
    zone: Zone,
    order: int,
    alloc_flags: int,
    highest_zoneidx: int,
    free: int | None = None,
) -> int:
    """Return COMPACT_SUCCESS, _SKIPPED or _CONTINUE: is there a block, or room to make one."""
    gfp = _GFP_OF_ZONE[highest_zoneidx]
    free = zone.nr_free_pages if free is None else free
    if m._would_serve(zone.index, gfp, order, alloc_flags, free):
        return COMPACT_SUCCESS
    mark = zone.low_wmark_pages() if order > 3 else zone.min_wmark_pages()
    if free <= mark + (2 << order) + zone.lowmem_reserve[highest_zoneidx]:
        return COMPACT_SKIPPED
    if order > 3 and 0 <= fragmentation_index(zone, order) <= m.vm.kept.get(
        "extfrag_threshold", _EXTFRAG_THRESHOLD
    ):
        return COMPACT_SKIPPED
    return COMPACT_CONTINUE


@traced
def try_to_compact_pages(
    m: Machine, nid: int, order: int, gfp: int, nodes: int, cpu: int, flags: int, priority: int
) -> tuple[int, int]:
    """Move pages together for an allocation that found no block; a stub, no page can move.

    :param nid: node whose zonelist is compacted; order, gfp: of the allocation.
    :return: a COMPACT_* result, always COMPACT_SKIPPED, and a block that was captured, or -1.
    """
    return COMPACT_SKIPPED, -1
