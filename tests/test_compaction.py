"""Compaction moves used pages together, and nothing that they hold gets lost."""

from __future__ import annotations

import contextlib
import errno

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmm import KernelError, Machine, _compaction
from kmm import compaction as c
from kmm.clock import SECOND
from kmm.errors import OutOfMemory
from kmm.gfp import __GFP_RETRY_MAYFAIL, __GFP_THISNODE, GFP_HIGHUSER_MOVABLE, GFP_KERNEL
from kmm.memory import User
from kmm.mempolicy import new_policy
from kmm.mmzone import Zone
from kmm.params import MAX_ORDER, PG_PINNED, PG_WRITEBACK
from kmm.validate_compaction import check_compaction
from kmm.vmstat import all_vm_events
from tests.conftest import DIMM, two_nodes
from tests.reference.compaction_twin import CompactionTwin

BLOCK = 128 << 20
FIRST = DIMM >> 12
COMPACT = "/sys/devices/system/node/node1/compact"
MOVABLE = GFP_HIGHUSER_MOVABLE | __GFP_THISNODE


def machine(cmdline: str = "memhp_default_state=online_movable") -> Machine:
    m = two_nodes(cmdline)
    m.plug("a", 1, DIMM, BLOCK)
    return m


def zone_of(m: Machine) -> Zone:
    return next(z for z in m.nodes[1].zones if z.populated)


def space(m: Machine, name: str, pages: int, kind: str = "shmem") -> User:
    user = User(m, name, kind, pages, policy=new_policy(m, "bind", [1]), tokens=True)
    user.fault(0, pages)
    user.write_tokens(0, np.arange(pages, dtype=np.uint64) + 1000 * len(m.users))
    return user


def every_other(m: Machine, pages: int = 100, files: int = 240) -> list[User]:
    """Node 1 in use, but for holes of some size: the files that are left."""
    users = [space(m, f"f{i}", pages) for i in range(files)]
    for user in users[1::2]:
        user.close()
    # What is still free lies in small holes too.
    rest = space(m, "rest", zone_of(m).nr_free_pages - 14000)
    zone_of(m).drain()
    return [*users[::2], rest]


def contents(users: list[User]) -> list[bytes]:
    return [u.read_tokens(0, u.pages).tobytes() for u in users]


def events(m: Machine) -> dict[str, int]:
    return {k: n for k, n in all_vm_events(m).items() if k.startswith(("compact_", "pgmigrate"))}


def large_blocks(zone: Zone) -> int:
    return sum(n << o for o, n in enumerate(zone.nr_free()) if o >= 9)


def fill_large(m: Machine) -> list[int]:
    """Take all blocks of order 9 and up of node 1's zone."""
    zone, taken = zone_of(m), []
    for order in (10, 9):
        for pfn in zone.free_list(order, 1):
            # The block of an order is the list's head.
            assert zone.rmqueue(order, 1) == pfn
            taken.append((pfn, order))
    return [pfn for pfn, _ in taken]


# -- the engine and its twin ----------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 700), min_size=3, max_size=24),
    gone=st.sets(st.integers(0, 23)),
    pinned=st.sets(st.tuples(st.integers(0, 23), st.integers(0, 699)), max_size=12),
    slabs=st.booleans(),
)
def test_every_page_goes_where_the_twin_says(
    sizes: list[int], gone: set[int], pinned: set[tuple[int, int]], slabs: bool
) -> None:
    m = machine(f"memhp_default_state=online_{'kernel' if slabs else 'movable'}")
    m.write("/proc/sys/vm/percpu_pagelist_high_fraction", "8")
    zone = zone_of(m)
    users = []
    for i, n in enumerate(sizes):
        users.append(space(m, f"u{i}", n, "anon" if i % 3 == 0 else "shmem"))
        if slabs and i % 4 == 1:
            cache = User(m, f"slab{i}", "slab", 20, policy=new_policy(m, "bind", [1]))
            cache.fault(0, 20)
    for i in sorted(gone):
        if i < len(users):
            users[i].close()
    left = [u for i, u in enumerate(users) if i not in gone]
    zone.drain()
    held = set()
    for i, index in pinned:
        user = users[i % len(users)]
        if user in left and user.kind != 1 and index < user.pages:
            pfn = int(user.pfns(index, 1)[0])
            m.memmap["flags"][pfn] |= PG_PINNED
            held.add(pfn)
    movable = {int(p) for u in left for p in u.pfns()}
    twin = CompactionTwin(
        zone.zone_start_pfn,
        zone.zone_end_pfn,
        {p: o for o in range(MAX_ORDER) for mt in range(3) for p in zone.free_list(o, mt)},
        movable,
        held,
        {
            b: m.memmap_engine.get_pageblock_migratetype(b * 512)
            for b in range(zone.zone_start_pfn // 512, zone.zone_end_pfn // 512)
        },
        zone.nr_free_pages - zone.watermark_min,
    )
    before, tokens, was = [u.pfns() for u in left], contents(left), events(m)
    twin.run()
    m.write(COMPACT, "1")
    goes = dict(twin.moves)
    for user, pfns in zip(left, before, strict=True):
        assert user.pfns().tolist() == [goes.get(p, p) for p in pfns.tolist()]
    assert contents(left) == tokens
    now = events(m)
    assert now["compact_migrate_scanned"] - was["compact_migrate_scanned"] == twin.migrate_scanned
    assert now["compact_free_scanned"] - was["compact_free_scanned"] == twin.free_scanned
    assert now["pgmigrate_success"] - was["pgmigrate_success"] == len(twin.moves)
    assert now["pgmigrate_fail"] - was["pgmigrate_fail"] == twin.failed
    m.validate()


# -- for a request --------------------------------------------------------------------------


def test_a_request_of_order_9_fails_without_and_succeeds_with_compaction() -> None:
    m = machine()
    users = every_other(m)
    tokens = contents(users)
    fill_large(m)
    compact = m.ops.try_to_compact_pages
    m.ops.try_to_compact_pages = lambda *_: (c.COMPACT_SKIPPED, -1)
    with pytest.raises(KernelError) as e:
        m.alloc_pages(9, MOVABLE, 1)
    assert e.value.errno == errno.ENOMEM
    assert contents(users) == tokens
    m.ops.try_to_compact_pages = compact
    pfn = m.alloc_pages(9, MOVABLE, 1)
    assert pfn % 512 == 0
    assert pfn >= FIRST
    assert contents(users) == tokens
    m.validate()
    m.free_pages(pfn, 9)
    m.validate()


def test_the_block_that_was_made_is_kept_for_who_compacts() -> None:
    m = machine()
    users = every_other(m)
    fill_large(m)
    zone = zone_of(m)
    free = zone.nr_free_pages + zone.pcp_pages()
    result, pfn = c.try_to_compact_pages(m, 1, 9, MOVABLE)
    assert (result, pfn % 512) == (c.COMPACT_SUCCESS, 0)
    assert m.memmap_engine.is_allocated(pfn, 9)
    assert not large_blocks(zone)
    assert zone.nr_free_pages + zone.pcp_pages() == free - 512
    m.validate()
    m.free_pages(pfn, 9)
    for user in users:
        user.close()
    m.validate()


def test_a_small_block_is_left_on_the_free_lists() -> None:
    # Blocks below order 9 are captured only from pageblocks of another type than Movable.
    m = machine()
    users = [space(m, f"u{i}", 1) for i in range(8)]
    rest = space(m, "all", zone_of(m).nr_free_pages - 2000)
    for i in range(0, 6000, 2):
        rest.release(i, 1)
    zone_of(m).drain()
    fill_large(m)
    for order in range(3, 9):
        while zone_of(m).free_counts()[1][order]:
            zone_of(m).rmqueue(order, 1)
    result, pfn = c.try_to_compact_pages(m, 1, 3, MOVABLE)
    assert (result, pfn) == (c.COMPACT_SUCCESS, -1)
    assert any(zone_of(m).nr_free()[3:])
    assert users[0].nr_present == 1
    m.validate()


def test_no_io_no_compaction() -> None:
    m = machine()
    every_other(m)
    assert c.try_to_compact_pages(m, 1, 9, MOVABLE & ~0x40) == (c.COMPACT_SKIPPED, -1)
    with pytest.raises(KernelError, match="order: 0; allowed"):
        c.try_to_compact_pages(m, 1, 0, MOVABLE)
    with pytest.raises(KernelError, match="priority: 3; allowed"):
        c.try_to_compact_pages(m, 1, 9, MOVABLE, priority=3)
    m.memmap_engine.begin_journal()
    assert c.try_to_compact_pages(m, 1, 9, MOVABLE) == (c.COMPACT_SKIPPED, -1)
    with pytest.raises(ValueError, match="chain of records"):
        c.compact_node(m, 1)
    m.memmap_engine.end_journal(False)
    m.validate()


# -- results, one by one --------------------------------------------------------------------


def result_of(m: Machine, priority: int = c.COMPACT_PRIO_SYNC_LIGHT, order: int = 9) -> str:
    result, pfn = c.try_to_compact_pages(m, 1, order, MOVABLE, priority=priority)
    if pfn >= 0:
        m.free_pages(pfn, order)
    return c.RESULT_NAMES[result]


def test_success_without_work_when_there_is_a_block() -> None:
    m = machine()
    assert result_of(m) == "success"
    assert events(m)["compact_migrate_scanned"] == 0
    m.validate()


def fault_as_far_as_there_is_memory(user: User) -> int:
    """Touch all pages until there is no memory; how many are there then."""
    user.gfp |= __GFP_RETRY_MAYFAIL  # nobody is killed for them
    with contextlib.suppress(OutOfMemory):
        user.fault(0, user.pages)
    return user.nr_present


def test_skipped_when_memory_itself_is_short() -> None:
    m = machine()
    user = User(m, "all", "anon", 32768, policy=new_policy(m, "bind", [1]))
    assert fault_as_far_as_there_is_memory(user) > 30000
    assert result_of(m) == "skipped"
    m.validate()


def test_skipped_when_want_of_memory_more_than_fragmentation_is_to_blame() -> None:
    m = machine()
    every_other(m)
    fill_large(m)
    zone = zone_of(m)
    index = c.fragmentation_index(zone, 9)
    assert 0 < index < 1000
    m.write("/proc/sys/vm/extfrag_threshold", str(index))
    engine = _compaction.compaction_suitable(zone, 9, 0, 3, index, zone.nr_free_pages)
    assert engine == c.COMPACT_NOT_SUITABLE_ZONE
    assert result_of(m) == "skipped"
    m.write("/proc/sys/vm/extfrag_threshold", str(index - 1))
    assert c.compaction_suitable(m, zone, 9, 0, 3) == c.COMPACT_CONTINUE
    assert c.compaction_suitable(m, zone, 9, 0, 3, free=10) == c.COMPACT_SKIPPED
    assert c.compaction_suitable(m, zone, -1, 0, 3) == c.COMPACT_CONTINUE
    assert result_of(m) == "success"
    m.validate()


def unmovable_everywhere(m: Machine) -> User:
    """A Normal zone with a slab in each pageblock, so that none can become free."""
    m.write("/proc/sys/vm/watermark_boost_factor", "0")
    zone = zone_of(m)
    cache = User(m, "cache", "slab", 32768, policy=new_policy(m, "bind", [1]))
    cache.fault(0, zone.nr_free_pages - 3000)
    for pfn in range(zone.zone_start_pfn, zone.zone_end_pfn, 512):
        m.memmap_engine.set_pageblock_migratetype(pfn, 1)
    slots = np.arange(cache.pages)
    for start in slots[::128]:
        cache.release(int(start), 100)
    zone.drain()
    fill_large(m)
    return cache


def test_partial_skipped_or_complete_and_then_deferred() -> None:
    m = machine("memhp_default_state=online_kernel")
    unmovable_everywhere(m)
    zone = zone_of(m)
    assert result_of(m, c.COMPACT_PRIO_ASYNC) == "partial_skipped"
    assert _compaction.compact_state(zone)["defer_shift"] == 0  # asynchronous runs defer nothing
    assert result_of(m) == "partial_skipped"
    state = _compaction.compact_state(zone)
    assert (state["defer_shift"], state["considered"], state["order_failed"]) == (1, 0, 0)
    assert state["blockskip_flush"] == 1
    assert state["cached_migrate_pfn"] == [zone.zone_start_pfn] * 2
    assert result_of(m) == "deferred"
    assert result_of(m, c.COMPACT_PRIO_SYNC_FULL) == "complete"
    # A run that begins where the last reset says has seen the whole zone too.
    start = zone.zone_start_pfn + 512
    _compaction.set_compact_state(
        zone, considered=9, init_migrate_pfn=start, cached_migrate_pfn=[start] * 2
    )
    assert result_of(m) == "complete"
    m.validate()


def test_contended_when_targets_end_before_the_scanners_meet_and_on_a_signal() -> None:
    m = machine()
    users = every_other(m)
    fill_large(m)
    tokens = contents(users)
    m.signal_pending = True
    assert result_of(m) == "contended"
    m.signal_pending = False
    # The zone can spare fewer pages than one round needs.
    zone = zone_of(m)
    zone.watermark_min = zone.nr_free_pages - 100
    cc = c.CompactControl(-1, GFP_KERNEL, c.MIGRATE_SYNC, c.CC_WHOLE_ZONE | c.CC_IGNORE_SKIP_HINT)
    assert c.compact_zone(m, zone, cc).result == c.COMPACT_CONTENDED
    assert contents(users) == tokens
    m.write("/proc/sys/vm/watermark_scale_factor", "10")
    m.validate()


# -- putting off, passing over --------------------------------------------------------------


def test_deferral_doubles_to_64_and_ends_with_a_success() -> None:
    m = machine()
    zone = zone_of(m)
    passed = []
    for _ in range(8):
        c.defer_compaction(zone, 9)
        n = 0
        while c.compaction_deferred(zone, 9):
            n += 1
        passed.append(n + 1)
    assert passed == [2, 4, 8, 16, 32, 64, 64, 64]
    _compaction.set_compact_state(zone, order_failed=9)
    assert not c.compaction_deferred(zone, 8)  # lower orders have not failed
    _compaction.set_compact_state(zone, order_failed=4)
    c.compaction_defer_reset(zone, 9, False)
    assert _compaction.compact_state(zone)["order_failed"] == 10
    assert _compaction.compact_state(zone)["defer_shift"] == 6
    c.compaction_succeeded(zone, 9)
    assert _compaction.compact_state(zone)["defer_shift"] == 0
    with pytest.raises(KeyError):
        _compaction.set_compact_state(zone, unheard_of=1)
    m.validate()


def test_pageblocks_without_anything_to_move_are_passed_over_until_kswapd_sleeps() -> None:
    m = machine("memhp_default_state=online_kernel")
    unmovable_everywhere(m)
    zone = zone_of(m)
    blocks = range(zone.zone_start_pfn, zone.zone_end_pfn, 512)
    assert result_of(m) == "partial_skipped"
    marked = [pfn for pfn in blocks if _compaction.pageblock_skip(m, pfn)]
    assert len(marked) > 50
    assert m.memmap_engine.get_pageblock_migratetype(marked[0]) == 1  # the bit beside is another
    seen = events(m)["compact_migrate_scanned"]
    _compaction.set_compact_state(zone, considered=9)
    assert result_of(m) == "partial_skipped"
    assert events(m)["compact_migrate_scanned"] - seen < 512
    c.reset_isolation_suitable(m, m.nodes[1])
    cleared = [pfn for pfn in marked if not _compaction.pageblock_skip(m, pfn)]
    # Half a zone is looked at from either side, for pages to move or for free ones.
    assert cleared
    assert _compaction.compact_state(zone)["blockskip_flush"] == 0
    c.reset_isolation_suitable(m, m.nodes[1])
    m.validate()


# -- what stays where it is -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "flag", "mode"),
    [
        ("anon", PG_PINNED, c.MIGRATE_SYNC),
        ("shmem", PG_PINNED, c.MIGRATE_SYNC),
        ("shmem", PG_WRITEBACK, c.MIGRATE_SYNC_LIGHT),
    ],
)
def test_what_somebody_holds_stays(kind: str, flag: int, mode: int) -> None:
    m = machine()
    user = space(m, "u", 40, kind)
    pfns = user.pfns()
    m.memmap["flags"][pfns[::2]] |= flag
    cc = c.CompactControl(-1, GFP_KERNEL, mode, c.CC_WHOLE_ZONE | c.CC_IGNORE_SKIP_HINT)
    space(m, "v", 1500).release(0, 1450)
    c.compact_zone(m, zone_of(m), cc)
    assert (user.pfns()[::2] == pfns[::2]).all()
    assert (user.pfns()[1::2] != pfns[1::2]).all()
    m.memmap["flags"][pfns[::2]] &= ~np.uint16(flag)
    c.compact_node(m, 1)
    assert (user.pfns() != pfns).all()
    m.validate()


def test_locked_pages_move_unless_they_are_not_allowed_to() -> None:
    m = machine()
    user = User(m, "u", "anon", 40, policy=new_policy(m, "bind", [1]))
    user.engine.locked = True
    user.fault(0, 40)
    pfns = user.pfns()
    space(m, "v", 1500).release(0, 1450)
    m.write("/proc/sys/vm/compact_unevictable_allowed", "0")
    m.write(COMPACT, "1")
    assert (user.pfns() == pfns).all()
    m.write("/proc/sys/vm/compact_unevictable_allowed", "1")
    m.write("/proc/sys/vm/compact_memory", "1")
    assert (user.pfns() != pfns).all()
    m.validate()


def test_files_stay_without_fs_and_huge_pages_always() -> None:
    m = machine()
    huge = User(m, "h", "anon", 512, policy=new_policy(m, "bind", [1]), thp="always")
    huge.fault(0, 512)
    users = {kind: space(m, kind, 100, kind) for kind in ("anon", "shmem", "file")}
    space(m, "v", 1500).release(0, 1400)
    before = {kind: u.pfns() for kind, u in users.items()}
    there = huge.pfns()
    flags = c.CC_WHOLE_ZONE | c.CC_IGNORE_SKIP_HINT
    c.compact_zone(m, zone_of(m), c.CompactControl(-1, 0x40, c.MIGRATE_SYNC, flags))
    assert (huge.pfns() == there).all()
    assert (users["anon"].pfns() != before["anon"]).all()
    assert (users["file"].pfns() == before["file"]).all()
    assert (users["shmem"].pfns() == before["shmem"]).all()
    m.validate()


# -- kcompactd ------------------------------------------------------------------------------


def test_kcompactd_makes_a_block_when_it_is_asked_and_time_passes() -> None:
    m = machine()
    m.write("/proc/sys/vm/compaction_proactiveness", "0")
    users = every_other(m)
    tokens = contents(users)
    fill_large(m)
    c.wakeup_kcompactd(m, 1, 0, 3)
    c.wakeup_kcompactd(m, 1, 9, 3)
    assert not large_blocks(zone_of(m))
    m.clock.advance(1)
    assert large_blocks(zone_of(m))
    assert contents(users) == tokens
    seen = events(m)
    assert seen["compact_daemon_wake"] == 1
    assert seen["compact_daemon_migrate_scanned"] == seen["compact_migrate_scanned"] > 0
    assert seen["compact_daemon_free_scanned"] == seen["compact_free_scanned"] > 0
    c.wakeup_kcompactd(m, 1, 9, 3)  # there is one now
    m.clock.advance(SECOND)
    assert events(m)["compact_daemon_wake"] == 1
    m.validate()


def test_kcompactd_defers_what_does_not_work() -> None:
    m = machine("memhp_default_state=online_kernel")
    m.write("/proc/sys/vm/compaction_proactiveness", "0")
    unmovable_everywhere(m)
    c.wakeup_kcompactd(m, 1, 9, 3)
    m.clock.advance(1)
    assert _compaction.compact_state(zone_of(m))["defer_shift"] == 1
    m.validate()


def test_kcompactd_works_by_itself_on_what_is_too_fragmented() -> None:
    m = machine()
    users = every_other(m)
    tokens = contents(users)
    fill_large(m)
    pgdat = m.nodes[1]
    assert c.fragmentation_score_node(pgdat) > 90
    m.write("/proc/sys/vm/compaction_proactiveness", "0")
    m.clock.advance(2 * SECOND)
    assert c.fragmentation_score_node(pgdat) > 90
    m.write("/proc/sys/vm/compaction_proactiveness", "20")
    m.clock.advance(1)
    score = c.fragmentation_score_node(pgdat)
    assert 70 < score <= 80
    m.write("/proc/sys/vm/compaction_proactiveness", "60")
    m.clock.advance(SECOND)
    assert c.fragmentation_score_node(pgdat) <= 40
    assert contents(users) == tokens
    assert (c.fragmentation_score_wmark(m, True), c.fragmentation_score_wmark(m, False)) == (40, 50)
    m.validate()


def test_kcompactd_looks_less_often_after_it_could_not_help() -> None:
    m = machine("memhp_default_state=online_kernel")
    unmovable_everywhere(m)
    m.clock.advance(SECOND)
    seen = events(m)["compact_free_scanned"] + events(m)["compact_migrate_scanned"]
    assert seen
    m.clock.advance(30 * SECOND)
    assert events(m)["compact_free_scanned"] + events(m)["compact_migrate_scanned"] == seen
    m.clock.advance(3 * SECOND)
    assert events(m)["compact_free_scanned"] + events(m)["compact_migrate_scanned"] > seen
    m.validate()


# -- what is shown --------------------------------------------------------------------------


def test_extfrag_of_zones_without_and_with_large_blocks() -> None:
    m = machine()
    path = "/sys/kernel/debug/extfrag/"
    assert m.listdir(path) == ["extfrag_index", "unusable_index"]
    row = m.read(path + "extfrag_index").splitlines()[-1]
    assert row == "Node 1, zone  Movable " + "-1.000 " * 11
    assert m.read(path + "unusable_index").splitlines()[-1].endswith(" " + "0.000 " * 11)
    every_other(m)
    fill_large(m)
    zone = zone_of(m)
    free, counts = zone.nr_free_pages, zone.nr_free()
    assert not any(counts[9:])
    row = m.read(path + "extfrag_index").splitlines()[-1]
    share = 1000 - (1000 + free * 1000 // 512) // sum(counts)
    assert row.split()[-2] == f"0.{share:03}"
    assert m.read(path + "unusable_index").splitlines()[-1].split()[-1] == "1.000"
    m.validate()


def test_an_index_below_zero_shows_the_sign_of_its_parts() -> None:
    m = machine()
    zone = zone_of(m)
    m.alloc_pages_bulk(zone.nr_free_pages, 0, MOVABLE, 1)
    while zone.rmqueue(0, 1) >= 0:
        pass
    assert c.fragmentation_index(zone, 1) == 0
    used = int(np.flatnonzero(m.page_states[FIRST : FIRST + 1024] == 0x20)[0]) + FIRST
    m.free_pages(used)
    zone.drain()
    assert c.fragmentation_index(zone, 1) == -500
    row = m.read("/sys/kernel/debug/extfrag/extfrag_index").splitlines()[-1]
    assert row.split()[4:6] == ["-1.000", "0.-500"]


def test_validate_finds_what_is_wrong() -> None:
    m = machine()
    zone = zone_of(m)
    check_compaction(m)
    for wrong in ({"defer_shift": 7}, {"considered": 2}, {"order_failed": 12}):
        good = _compaction.compact_state(zone)
        _compaction.set_compact_state(zone, **wrong)
        with pytest.raises(Exception, match=next(iter(wrong))):
            check_compaction(m)
        _compaction.set_compact_state(zone, **good)
    m.validate()
