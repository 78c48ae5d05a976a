"""Which pages reclaim takes, which it spares, and how hard it tries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kmm import Machine, _filemap
from kmm._vmscan import reclaim_state, set_reclaim_state, shrink_lists
from kmm.gfp import GFP_HIGHUSER_MOVABLE, GFP_KERNEL
from kmm.memory import User
from kmm.page_alloc import ALL_NODES
from kmm.params import PG_ACTIVE, PG_PINNED, SLOT_PFN, SLOT_YOUNG
from kmm.vmscan import PGDAT_DIRTY, ScanControl, shrink_node, try_to_free_pages
from kmm.vmstat import all_node_items, all_vm_events
from tests.conftest import two_nodes
from tests.tampering import writable


def scan(m: Machine, **more: Any) -> ScanControl:
    """Scan node 0 once for all that its lists have."""
    sc = ScanControl(1 << 40, GFP_KERNEL, 3, priority=0, **more)
    shrink_node(m, m.nodes[0], sc)
    return sc


def clean_file(m: Machine, pages: int, name: str = "f") -> User:
    user = User(m, name, "file", pages, tokens=True)
    user.write(0, pages)
    user.write_tokens(0, np.arange(pages) + 1)
    m.sync()
    return user


def test_clean_pages_are_dropped_and_read_again(m: Machine) -> None:
    f = clean_file(m, 1000)
    sc = scan(m)
    assert (sc.nr_scanned, sc.nr_reclaimed, f.nr_present) == (1000, 1000, 0)
    events = all_vm_events(m)
    assert events["pgscan_direct"] == events["pgscan_file"] == 1000
    assert events["pgsteal_direct"] == events["pgsteal_file"] == 1000
    f.read(0, 1000)
    assert (f.read_tokens(0, 1000) == np.arange(1000) + 1).all()
    m.validate()


def test_dirty_pages_wait_for_the_flusher(m: Machine) -> None:
    f = User(m, "f", "file", 1000)
    f.write(0, 1000)
    sc = scan(m)
    # It was woken, and what it wrote comes first now.
    assert sc.nr_reclaimed == 0
    assert sc.nr["unqueued_dirty"] == 1000
    items = all_node_items(m)
    assert items["nr_vmscan_immediate_reclaim"] == items["nr_written"] == 1000
    assert all_vm_events(m)["pgrotated"] == 1000
    assert items["nr_inactive_file"] == 1000
    m.validate()
    assert scan(m).nr_reclaimed == 1000
    m.validate()


def test_kswapd_writes_itself_where_all_is_dirty(m: Machine) -> None:
    m.writeback_delay = 1
    f = User(m, "f", "file", 100, tokens=True)
    f.write(0, 100)
    f.write_tokens(0, np.arange(100) + 7)
    sc = ScanControl(1 << 40, GFP_KERNEL, 3, priority=0, kswapd=True)
    shrink_lists(m, 0, sc)
    assert sc.nr_reclaimed == 0  # activated, to be reclaimed when they are written
    assert all_node_items(m)["nr_active_file"] == 100
    failures, flags, _, _ = reclaim_state(m, 0)
    set_reclaim_state(m, 0, failures, flags | PGDAT_DIRTY)
    shrink_lists(m, 0, sc)
    shrink_lists(m, 0, sc)
    assert sc.nr_reclaimed == 100
    assert all_node_items(m)["nr_vmscan_write"] == 100
    assert (f.read_tokens(0, 100) == np.arange(100) + 7).all()
    m.validate()


def test_pages_under_writeback_are_left_to_it(m: Machine) -> None:
    m.writeback_delay = 1000
    f = User(m, "f", "file", 200)
    f.write(0, 200)
    _filemap.write_cache_pages(f.engine, m, 0, 200, 200, False)
    sc = scan(m)
    assert (sc.nr_reclaimed, sc.nr["writeback"], sc.nr["dirty"]) == (0, 200, 200)
    assert all_node_items(m)["nr_active_file"] == 200
    _filemap.end_writeback(f.engine, m, 0, 200)
    assert all_vm_events(m)["pgrotated"] == 200
    assert scan(m).nr_reclaimed == 200
    m.validate()


def test_a_page_read_twice_is_active_and_has_to_become_inactive_first(m: Machine) -> None:
    f = clean_file(m, 1000)
    f.read(0, 600)
    f.read(0, 600)
    assert all_node_items(m)["nr_active_file"] == 600
    sc = scan(m)
    assert f.nr_present == 600 - sc.nr_reclaimed + 400
    events = all_vm_events(m)
    assert events["pgrefill"] == events["pgdeactivate"] == 600
    scan(m)
    assert f.nr_present == 0
    m.validate()


def test_mapped_pages_go_when_nobody_touches_them(m: Machine) -> None:
    f = User(m, "f", "file", 300)
    f.engine.mapped = True
    f.read(0, 300)
    assert f.engine.slots[0] & np.uint64(SLOT_YOUNG)
    assert scan(m).nr_reclaimed == 0
    assert not f.engine.slots[0] & np.uint64(SLOT_YOUNG)
    f.read(0, 100)
    assert scan(m).nr_reclaimed == 200
    assert all_vm_events(m)["pgactivate"] == 100
    assert f.nr_present == 100
    m.validate()


def test_pinned_and_mlocked_pages_stay() -> None:
    m = two_nodes(swap="1G")
    f, a = clean_file(m, 100), User(m, "a", "anon", 300)
    a.fault(0, 300)
    locked = User(m, "locked", "anon", 50)
    locked.fault(0, 50)
    locked.engine.locked = True
    for user, index in ((f, 5), (a, 6)):
        m.memmap["flags"][user.engine.slots[index] & np.uint64(SLOT_PFN)] |= PG_PINNED
    for _ in range(4):
        scan(m)
    assert (f.nr_present, a.nr_present, locked.nr_present) == (1, 1, 50)
    events = all_vm_events(m)
    assert events["unevictable_pgs_culled"] == events["unevictable_pgs_mlocked"] == 50
    assert all_node_items(m)["nr_unevictable"] == 50
    assert "Mlocked:             200 kB" in m.read("/proc/meminfo")
    m.validate()


def test_without_swap_anonymous_pages_are_not_even_looked_at(m: Machine) -> None:
    a = User(m, "a", "anon", 1000)
    a.fault(0, 1000)
    assert scan(m).nr_scanned == 0
    assert a.nr_present == 1000
    m.validate()


def test_enough_inactive_file_pages_spare_anonymous_ones() -> None:
    m = two_nodes(swap="1G")
    clean_file(m, 10_000)
    a = User(m, "a", "anon", 10_000)
    a.fault(0, 10_000)
    sc = ScanControl(1 << 40, GFP_KERNEL, 3, priority=6)
    shrink_lists(m, 0, sc)
    events = all_vm_events(m)
    assert (events["pgscan_anon"], events["pgscan_file"]) == (0, 10_000 >> 6)
    # In the end both are scanned as far as they go.
    scan(m)
    assert all_vm_events(m)["pgscan_anon"] == 10_000
    m.validate()


def test_enough_stops_the_smaller_sort_and_scans_the_larger_as_far() -> None:
    m = two_nodes(swap="1G")
    clean_file(m, 3000)
    a = User(m, "a", "anon", 1000)
    a.fault(0, 1000)
    writable(a.engine.slots)[:] &= ~np.uint64(SLOT_YOUNG)
    sc = ScanControl(1, GFP_KERNEL, 3, priority=0, kswapd=True)
    shrink_lists(m, 0, sc)
    # A batch of each; 96 % of 1000 are left then, so of 3000 all but 120 are not asked for, of
    # which 32 are done: one batch more, and of one sort nothing is left.
    events = all_vm_events(m)
    assert (events["pgsteal_anon"], events["pgsteal_file"]) == (32, 64)
    m.validate()


def test_costs_move_the_balance(m: Machine) -> None:
    m.swapon(1 << 30)
    f, a = clean_file(m, 40_000), User(m, "a", "anon", 40_000)
    f.read(0, 25_000)
    f.read(0, 25_000)  # so many active ones that no mode but the balance applies
    a.fault(0, 40_000)
    shares = []
    for setting in (0, 60, 200):
        before = all_vm_events(m)
        sc = ScanControl(1 << 40, GFP_KERNEL, 3, priority=7, swappiness=setting)
        shrink_lists(m, 0, sc)
        after = all_vm_events(m)
        shares.append([after[k] - before[k] for k in ("pgscan_anon", "pgscan_file")])
    assert shares[0][0] == 0
    assert shares[0][1] > 0
    assert 0 < shares[1][0] < shares[2][0]
    assert shares[2][1] == 0
    m.validate()


def test_pages_of_higher_zones_are_passed_over() -> None:
    m = two_nodes("memhp_default_state=online_movable")
    m.plug("a", 0, 0x100000000, 1 << 27)
    f = clean_file(m, 20_000)
    where = {m.page_zone(int(p)).zone_idx for p in f.pfns()}  # type: ignore[union-attr]
    assert where == {3}
    sc = ScanControl(1 << 40, GFP_KERNEL, 1, priority=0)
    shrink_lists(m, 0, sc)
    assert sc.nr_reclaimed == 0
    g = User(m, "g", "file", 40_000)
    g.read(0, 40_000)
    shrink_lists(m, 0, sc)
    assert sc.nr_reclaimed > 0
    assert f.nr_present == 20_000
    assert all_vm_events(m)["pgskip_movable"] > 20_000
    m.validate()


def test_direct_reclaim_gets_its_32_pages_and_no_flood() -> None:
    m = two_nodes()
    f = clean_file(m, 50_000)
    before = all_vm_events(m)
    got = try_to_free_pages(m, 0, 0, GFP_HIGHUSER_MOVABLE, ALL_NODES, 0)
    assert 32 <= got <= 64
    assert f.nr_present == 50_000 - got
    after = all_vm_events(m)
    assert after["allocstall_movable"] - before["allocstall_movable"] == 1
    m.validate()


def test_reclaim_without_rights_leaves_what_needs_them() -> None:
    m = two_nodes(swap="1G")
    shmem, a = User(m, "s", "shmem", 100), User(m, "a", "anon", 100)
    shmem.fault(0, 100)
    a.fault(0, 100)
    for gfp, left in ((GFP_KERNEL & ~0xC0, (100, 100)), (GFP_KERNEL & ~0x80, (100, 0))):
        for _ in range(3):
            shrink_lists(m, 0, ScanControl(1 << 40, gfp, 3, priority=0))
        assert (shmem.nr_present, a.nr_present) == left
    m.validate()


def test_what_reclaim_activates_is_counted(m: Machine) -> None:
    m.swapon(1 << 30)
    a = User(m, "a", "anon", 500)
    a.fault(0, 500)
    scan(m)
    a.read(0, 120)
    scan(m)
    assert all_vm_events(m)["pgactivate"] == 120
    pfns = a.pfns()
    present = pfns[pfns >= 0]
    assert len(present) == 120
    # As there are no inactive ones left, some of them are to show once more that they are needed.
    assert np.count_nonzero(m.memmap["flags"][present] & PG_ACTIVE) == 120 - 32
    assert all_vm_events(m)["pgdeactivate"] == 32
    m.validate()


@pytest.mark.parametrize("field", ["priority", "reclaim_idx"])
def test_a_bad_scan_is_refused(m: Machine, field: str) -> None:
    sc = ScanControl(32, GFP_KERNEL, 3)
    setattr(sc, field, 99)
    with pytest.raises(ValueError, match="ScanControl"):
        shrink_lists(m, 0, sc)
