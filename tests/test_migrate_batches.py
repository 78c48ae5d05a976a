"""migrate_pages: batches, passes, and each way in which a page can fail to move."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmm import KernelError, Machine, _migrate, _page_ref
from kmm._memory import page_owner
from kmm.clock import SECOND
from kmm.gfp import __GFP_MEMALLOC, __GFP_RECLAIM, __GFP_THISNODE
from kmm.memory import User
from kmm.mempolicy import new_policy
from kmm.migrate import MigrationResult, MigrationTarget, is_huge, migrate_pages
from kmm.page_alloc import __alloc_pages
from kmm.page_writeback import wb_writeback
from kmm.params import (
    MIGRATE_ASYNC,
    MIGRATE_SYNC,
    MIGRATE_SYNC_LIGHT,
    PG_LRU,
    PG_PINNED,
    PG_WRITEBACK,
)
from kmm.used_pages import live_entries, used_pages
from kmm.vmstat import all_node_items, all_vm_events
from tests.conftest import DIMM, two_nodes
from tests.reference import migrate_twin
from tests.reference.migrate_twin import Entry

START = DIMM >> 12
STATE = "/sys/devices/system/memory/memory32/state"
TARGET = MigrationTarget(0x1464CA, 0, (0,))
MS = SECOND // 1000
EVENTS = ("pgmigrate_success", "pgmigrate_fail", "thp_migration_success")
EVENTS += ("thp_migration_fail", "thp_migration_split", "thp_split_page", "thp_split_page_failed")


def machine() -> Machine:
    m = two_nodes("memhp_default_state=online_movable")
    m.plug("a", 1, DIMM, 256 << 20)
    return m


def user(m: Machine, name: str, kind: str, pages: int, **more: Any) -> User:
    return User(m, name, kind, pages, policy=new_policy(m, "bind", [1]), **more)


def anon(m: Machine, pages: int, name: str = "hog", thp: str = "never") -> User:
    made = user(m, name, "anon", pages, thp=thp)
    made.grow(pages)
    return made


def written(m: Machine, pages: int, delay: int, name: str = "file") -> User:
    """A file all of whose pages are being written, for as long as told."""
    made = user(m, name, "file", pages)
    made.write(0, pages)
    m.writeback_delay = delay
    wb_writeback(m, pages)
    return made


def isolate(m: Machine) -> np.ndarray:
    out, refused = np.zeros(65536, np.uint64), np.zeros(4, np.uint64)
    n, _ = _migrate.isolate_range(m.memmap_engine, START, START + 65536, out, refused)
    return out[:n]


def marks(m: Machine, pfn: int) -> int:
    return _page_ref.marks(m.memmap_engine, pfn)


def events(m: Machine) -> dict[str, int]:
    now = all_vm_events(m)
    return {name: now[name] for name in EVENTS if now[name]}


def allocated(m: Machine) -> int:
    return sum(n for name, n in all_vm_events(m).items() if name.startswith("pgalloc_"))


def lru(m: Machine, nid: int, which: int) -> list[int]:
    pages, _ = used_pages(m)
    return pages.pfn[live_entries(m, pages, nid, which)[0]].tolist()


def fill_node_0(m: Machine, leave: int = 0) -> User:
    """Leave nothing of the target node, or so many pages that can be had, none beside another."""
    filler = User(m, "filler", "kernel", m.totalram_pages, policy=new_policy(m, "bind", [0]))
    with pytest.raises(KernelError):
        filler.grow(filler.pages)
    at = iter(range(0, filler.nr_present, 2))
    while leave:
        filler.release(next(at), 1)
        try:
            m.free_pages(__alloc_pages(m, TARGET.gfp & ~__GFP_RECLAIM, 0, 0, (0,)))
        except KernelError:
            continue
        leave -= 1
    return filler


# -- writeback -------------------------------------------------------------------------------------


def test_a_writeback_is_waited_for_from_the_fourth_pass_on() -> None:
    m = machine()
    file = written(m, 20, 3 * SECOND)
    before = allocated(m)
    result = migrate_pages(m, isolate(m), TARGET)
    assert m.clock.now == 3 * SECOND
    assert (result.nr_succeeded, result.nr_failed, result.ret) == (20, 0, 0)
    # Three passes in vain, then the first one is waited for and all are written.
    assert allocated(m) - before == 4 * 20
    assert (file.pfns() < START).all()
    assert not any(marks(m, int(pfn)) & PG_WRITEBACK for pfn in file.pfns())
    assert all_node_items(m)["nr_writeback"] == 0
    assert events(m) == {"pgmigrate_success": 20}
    m.validate()


@pytest.mark.parametrize("mode", [MIGRATE_ASYNC, MIGRATE_SYNC_LIGHT])
def test_who_may_not_wait_gives_up_at_once(mode: int) -> None:
    m = machine()
    file = written(m, 20, 3 * SECOND)
    was = file.pfns()
    hog = anon(m, 5)
    before = allocated(m)
    result = migrate_pages(m, isolate(m), TARGET, mode)
    assert m.clock.now == 0
    assert (result.nr_succeeded, result.nr_failed, result.ret) == (5, 20, 20)
    assert allocated(m) - before == 25
    assert (file.pfns() == was).all()
    assert (hog.pfns() < START).all()
    assert all(marks(m, int(pfn)) & PG_LRU for pfn in was)
    assert events(m) == {"pgmigrate_success": 5, "pgmigrate_fail": 20}
    m.sync()
    assert all_node_items(m)["nr_writeback"] == 0
    m.validate()


def test_an_offline_waits_for_what_is_being_written() -> None:
    m = machine()
    file = written(m, 600, 250 * MS)
    m.write(STATE, "offline")
    assert m.clock.now == 250 * MS
    assert not ((file.pfns() >= START) & (file.pfns() < START + 32768)).any()
    assert all_node_items(m)["nr_writeback"] == 0
    m.validate()


def test_a_file_that_goes_while_its_page_is_waited_for() -> None:
    m = machine()
    file = written(m, 20, 3 * SECOND)
    m.clock.call_after(SECOND, file.close)
    result = migrate_pages(m, isolate(m), TARGET)
    assert result.ret == 0
    assert len(result.left) == 0
    # All of them are done with: nobody's page need not move.
    assert events(m) == {"pgmigrate_success": 20}
    assert all_node_items(m)["nr_isolated_file"] == 0
    m.validate()


# -- pins ------------------------------------------------------------------------------------------


def test_a_held_page_is_tried_ten_times_within_its_batch() -> None:
    m = machine()
    hog = anon(m, 1500)
    pins = [m.pin(hog, i, long_term=False) for i in (3, 600)]
    was, before = hog.pfns(), allocated(m)
    pfns = isolate(m)
    result = migrate_pages(m, pfns, TARGET)
    assert (result.nr_succeeded, result.nr_failed, result.ret) == (1498, 2, 2)
    assert sorted(result.left.tolist()) == sorted(was[[3, 600]].tolist())
    assert allocated(m) - before == 1498 + 2 * 10
    assert events(m) == {"pgmigrate_success": 1498, "pgmigrate_fail": 2}
    for pin in pins:
        m.unpin(pin)
    m.validate()


def test_a_held_huge_page_counts_once_and_with_all_its_pages() -> None:
    m = machine()
    hog = anon(m, 1024, thp="always")
    m.pin(hog, 0, long_term=False)
    result = migrate_pages(m, isolate(m), TARGET)
    assert (result.nr_failed, result.nr_thp_failed, result.ret) == (512, 1, 1)
    assert events(m) == {
        "pgmigrate_success": 512,
        "pgmigrate_fail": 512,
        "thp_migration_success": 1,
        "thp_migration_fail": 1,
    }
    m.validate()


# -- no target -------------------------------------------------------------------------------------


def test_the_first_small_page_without_target_ends_the_call() -> None:
    m = machine()
    hog = anon(m, 1500)
    fill_node_0(m)
    was = events(m)
    pfns = isolate(m).copy()
    result = migrate_pages(m, pfns, TARGET)
    assert result.ret == -errno.ENOMEM
    moved = result.nr_succeeded
    # Only the page that had no target failed; the others were not tried.
    assert (result.nr_failed, len(result.left)) == (1, 1500 - moved)
    assert result.left.tolist() == pfns[moved:].tolist()
    assert events(m).get("pgmigrate_fail", 0) - was.get("pgmigrate_fail", 0) == 1
    assert hog.nr_present == 1500
    assert all_node_items(m)["nr_isolated_anon"] == 0
    m.validate()


def test_what_was_tried_in_the_pass_that_ended_the_call_failed_too() -> None:
    m = machine()
    hog = anon(m, 600)
    pfns = isolate(m).copy()
    for pfn in pfns[[0, 1, 2]].tolist():
        owner, index = page_owner(m.memmap_engine, pfn)
        assert owner == hog.engine.number
        m.pin(hog, index, long_term=False)
    fill_node_0(m, leave=100)
    # What the three are given comes back; soon there is nothing left for the others.
    result = migrate_pages(m, pfns, TARGET)
    assert result.ret == -errno.ENOMEM
    assert 3 < result.nr_succeeded + 3 < 600
    # The three of the pass that ended it, and the one that had no target.
    assert events(m)["pgmigrate_fail"] == result.nr_failed == 3 + 1
    assert result.left[:3].tolist() == pfns[:3].tolist()
    assert result.left.tolist()[3:] == pfns.tolist()[3 + result.nr_succeeded :]
    m.validate()


def test_a_held_huge_page_without_target_cannot_be_split() -> None:
    m = machine()
    hog = anon(m, 512, thp="always")
    pin = m.pin(hog, 0, long_term=False)
    fill_node_0(m)
    result = migrate_pages(m, isolate(m), TARGET)
    assert result.ret == -errno.ENOMEM
    assert events(m) == {
        "pgmigrate_fail": 512,
        "thp_migration_fail": 1,
        "thp_split_page_failed": 1,
    }
    assert is_huge(m, int(hog.pfns()[0]))
    m.unpin(pin)
    m.validate()


def test_a_huge_page_without_huge_target_goes_in_parts() -> None:
    m = machine()
    hog = user(m, "hog", "anon", 512, thp="always", tokens=True)
    hog.grow(512)
    written = np.arange(7000, 7512)
    hog.write_tokens(0, written)
    start = int(hog.pfns()[0])
    assert is_huge(m, start)
    filler = fill_node_0(m)
    # Of each two neighbours one page stays, and what is kept free of order 9 goes.
    for at in np.flatnonzero(filler.pfns() & 1)[:40_000].tolist():
        filler.release(at, 1)
    large = m.alloc_pages_bulk(1000, 9, __GFP_MEMALLOC | __GFP_THISNODE, 0)
    was = events(m)
    result = migrate_pages(m, isolate(m), TARGET)
    assert (result.nr_succeeded, len(result.left)) == (512, 0)
    assert (result.nr_thp_split, result.nr_thp_failed, result.nr_thp_succeeded) == (1, 1, 0)
    assert {name: n - was.get(name, 0) for name, n in events(m).items()} == {
        "pgmigrate_success": 512,
        "thp_migration_fail": 1,
        "thp_migration_split": 1,
        "thp_split_page": 1,
    }
    assert (hog.pfns() < START).all()
    assert not any(is_huge(m, int(pfn)) for pfn in hog.pfns())
    assert hog.read_tokens(0, 512).tolist() == written.tolist()
    assert result.moved()[0].tolist() == list(range(start, start + 512))
    m.free_pages_bulk(large, 9)
    m.validate()


def test_the_log_says_what_migrate_pages_returned() -> None:
    m = machine()
    hog = anon(m, 1500)
    for i in (3, 600, 601):
        m.pin(hog, i, long_term=False)
    m.clock.call_after(SECOND, lambda: setattr(m, "signal_pending", True))
    with pytest.raises(KernelError):
        m.write(STATE, "offline")
    lines = [line for line in m.log if "migrating pfn" in line]
    assert lines[0].endswith(f"migrating pfn {int(hog.pfns()[3]):x} failed ret:3")
    m.validate()


# -- against the twin ------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    small=st.integers(0, 900),
    huge=st.integers(0, 3),
    files=st.lists(st.tuples(st.integers(1, 400), st.sampled_from([0, 1, 50, 700])), max_size=3),
    pins=st.lists(st.tuples(st.integers(0, 5), st.floats(0, 0.999)), max_size=6),
    first=st.integers(0, 511),
    mode=st.sampled_from([MIGRATE_SYNC, MIGRATE_SYNC, MIGRATE_SYNC_LIGHT, MIGRATE_ASYNC]),
)
def test_as_the_twin(
    small: int,
    huge: int,
    files: list[tuple[int, int]],
    pins: list[tuple[int, float]],
    first: int,
    mode: int,
) -> None:
    m = machine()
    users, ends = [], {}
    if first:
        users.append(anon(m, first, "first"))
    for i, (pages, delay) in enumerate(files):
        users.append(written(m, pages, delay * MS, f"file{i}"))
        ends[users[-1].engine.number] = delay * MS
    if huge:
        users.append(anon(m, 512 * huge, "huge", thp="always"))
    if small:
        users.append(anon(m, small, "small"))
    for which, where in pins:
        if which < len(users):
            m.pin(users[which], int(where * users[which].pages), long_term=False)
    pfns = isolate(m).copy()
    entries = []
    for pfn in pfns.tolist():
        owner = m.user_of(pfn)
        assert owner is not None
        pages = 512 if is_huge(m, pfn) else 1
        held = bool(marks(m, pfn) & PG_PINNED)
        entries.append(Entry(pfn, pages, held, ends.get(owner.engine.number, 0)))
    want = migrate_twin.migrate_pages(entries, mode, m.clock.now)
    before = allocated(m)
    result: MigrationResult = migrate_pages(m, pfns, TARGET, mode)
    assert result.left.tolist() == want.left
    assert (m.clock.now, allocated(m) - before) == (want.now, want.asked)
    assert (result.nr_succeeded, result.nr_failed) == (want.succeeded, want.failed)
    assert (result.nr_thp_failed, result.ret) == (want.thp_failed, len(want.left))
    was, to = result.moved()
    where_to = dict(zip(was.tolist(), to.tolist(), strict=True))
    assert sorted(where_to) == sorted(want.moved)
    # Those that moved stand on the lists of the other node in the order in which they did.
    rank = {where_to[pfn]: i for i, pfn in enumerate(want.moved)}
    for which in (0, 2):
        order = [rank[pfn] for pfn in lru(m, 0, which) if pfn in rank]
        assert order == sorted(order)
    m.validate()
