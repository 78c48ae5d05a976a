"""Pages of files are read, written, dropped and read again, and hold what was written."""

from __future__ import annotations

import numpy as np
import pytest

from kmm import KernelError, Machine, _filemap
from kmm.memory import User
from kmm.params import PG_ACTIVE, PG_DIRTY, PG_REFERENCED, PG_WRITEBACK, SLOT_PFN
from kmm.vmstat import all_node_items, all_vm_events, zone_items
from tests.conftest import two_nodes


def a_file(m: Machine, pages: int, name: str = "f", kind: str = "file") -> User:
    user = User(m, name, kind, pages, tokens=True)
    user.write(0, pages)
    user.write_tokens(0, tokens(pages))
    return user


def tokens(pages: int) -> np.ndarray:
    return np.arange(pages, dtype=np.uint64) * 5 + 3


def holds(user: User) -> bool:
    return bool((user.read_tokens(0, user.pages) == tokens(user.pages)).all())


def flags(user: User, index: int) -> int:
    return int(user.m.memmap["flags"][user.engine.slots[index] & np.uint64(SLOT_PFN)])


def drop(m: Machine, what: int = 1) -> None:
    m.write("/proc/sys/vm/drop_caches", str(what))


def test_what_a_file_holds_survives_its_pages(m: Machine) -> None:
    f = a_file(m, 5000)
    for _ in range(3):
        m.sync()
        drop(m)
        assert f.nr_present == 0
        assert holds(f)
        assert f.read(0, 5000) == 5000
        assert holds(f)
        f.write(100, 50)
        m.validate()


def test_only_clean_pages_are_dropped(m: Machine) -> None:
    f = a_file(m, 600)
    m.sync()
    f.write(10, 20)
    drop(m)
    assert f.nr_present == 20
    assert holds(f)
    mapped = User(m, "mapped", "file", 30)
    mapped.engine.mapped = True
    mapped.read(0, 30)
    m.sync()
    drop(m)
    assert (f.nr_present, mapped.nr_present) == (0, 30)
    assert all_vm_events(m)["drop_pagecache"] == 2
    m.validate()


def test_a_page_that_could_not_be_dropped_is_the_next_to_go(m: Machine) -> None:
    f = a_file(m, 100)
    m.sync()
    f.read(0, 100)
    f.read(0, 100)
    assert flags(f, 7) & PG_ACTIVE
    f.write(7, 1)
    drop(m)
    assert not flags(f, 7) & (PG_ACTIVE | PG_REFERENCED)
    assert all_vm_events(m)["pgdeactivate"] == 1
    m.sync()
    assert all_vm_events(m)["pgrotated"] == 1
    m.validate()


def test_reading_twice_makes_active_and_writing_does_not(m: Machine) -> None:
    f = a_file(m, 300)
    for _ in range(3):
        f.write(0, 300)
    assert all_node_items(m)["nr_active_file"] == 0
    m.sync()
    drop(m)
    f.read(0, 300)
    assert all_vm_events(m)["pgpgin"] == 1200
    assert flags(f, 0) & PG_REFERENCED
    assert all_node_items(m)["nr_inactive_file"] == 300
    f.read(0, 200)
    assert all_node_items(m)["nr_active_file"] == 200
    assert all_vm_events(m)["pgactivate"] == 200
    m.validate()


def test_shmem_is_active_when_it_was_written_twice(m: Machine) -> None:
    f = a_file(m, 64, kind="shmem")
    assert flags(f, 0) & PG_REFERENCED
    f.write(0, 64)
    assert all_node_items(m)["nr_active_anon"] == 64
    drop(m)
    assert f.nr_present == 64
    assert holds(f)
    m.validate()


@pytest.mark.parametrize("kind", ["anon", "shmem"])
def test_what_nobody_wrote_is_read_as_zeros_and_takes_no_memory(m: Machine, kind: str) -> None:
    user = User(m, "u", kind, 1000, tokens=True)
    assert user.read(0, 1000) == 0
    assert user.write(500, 10) == 10
    assert user.read(0, 1000) == 0
    assert user.nr_present == 10
    m.validate()


def test_fresh_pages_hold_nothing_of_who_had_them_before(m: Machine) -> None:
    a = User(m, "a", "anon", 100_000, tokens=True)
    a.write(0, 100_000)
    a.write_tokens(0, np.full(100_000, 99))
    a.close()
    b = User(m, "b", "anon", 100_000, tokens=True)
    b.write(0, 100_000)
    assert not b.read_tokens(0, 100_000).any()
    m.validate()


def test_a_cut_file_is_empty_there(m: Machine) -> None:
    f = a_file(m, 100)
    m.sync()
    f.release(20, 30)
    assert f.read(0, 100) == 30
    got = f.read_tokens(0, 100)
    assert not got[20:50].any()
    assert (got[:20] == tokens(20)).all()
    assert (got[50:] == tokens(100)[50:]).all()
    m.validate()


def test_each_counter_of_dirty_pages(m: Machine) -> None:
    m.writeback_delay = 1000
    f = User(m, "f", "file", 100, tokens=True)
    f.write(0, 100)
    zone = m.page_zone(int(f.pfns(0, 1)[0]))
    assert zone is not None
    f.write(0, 50)
    items = all_node_items(m)
    assert (items["nr_dirty"], items["nr_dirtied"], items["nr_written"]) == (100, 100, 0)
    assert zone_items(zone)["nr_zone_write_pending"] == 100
    assert _filemap.write_cache_pages(f.engine, m, 0, 100, 30, False) == (30, 30)
    items = all_node_items(m)
    assert (items["nr_dirty"], items["nr_writeback"], items["nr_written"]) == (70, 30, 0)
    assert zone_items(zone)["nr_zone_write_pending"] == 100
    assert flags(f, 0) & (PG_DIRTY | PG_WRITEBACK) == PG_WRITEBACK
    f.write(0, 1)
    assert flags(f, 0) & (PG_DIRTY | PG_WRITEBACK) == PG_DIRTY | PG_WRITEBACK
    assert _filemap.end_writeback(f.engine, m, 0, 100) == 30
    items = all_node_items(m)
    assert (items["nr_dirty"], items["nr_writeback"], items["nr_written"]) == (71, 0, 30)
    assert zone_items(zone)["nr_zone_write_pending"] == 71
    assert all_vm_events(m)["pgpgout"] == 120
    m.validate()


def test_bad_requests_name_what_is_wrong(m: Machine) -> None:
    f = a_file(m, 10)
    for start, n, word in ((0, 11, "n: 11"), (-1, 1, "start: -1"), (0, -1, "n: -1")):
        for call in (f.read, f.write):
            with pytest.raises(KernelError, match=word):
                call(start, n)
    with pytest.raises(KernelError, match="kind: 'slab'"):
        User(m, "s", "slab", 10).read(0, 1)
    with pytest.raises(KernelError, match="drop_caches"):
        drop(m, 5)
    assert f.nr_present == 10
    m.validate()


def test_a_machine_of_two_nodes_drops_both(m: Machine) -> None:
    two = two_nodes("memhp_default_state=online_movable")
    two.plug("a", 1, 0x100000000, 1 << 28)
    f = User(two, "f", "file", 250_000)
    assert f.read(0, 250_000) == 250_000
    assert {z.nid for z in two.all_zones() if z.stat()[2]} == {0, 1}
    drop(two, 3)
    assert f.nr_present == 0
    two.validate()
