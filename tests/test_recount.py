"""The recount agrees with one that reads all records out, and refuses what is not there."""

from __future__ import annotations

import numpy as np
import pytest

from kmm import Machine
from kmm._memory import PageUser
from kmm._recount import Recount, taken_pages
from kmm.params import (
    PG_ACTIVE,
    PG_DIRTY,
    PG_LRU,
    PG_MLOCKED,
    PG_WRITEBACK,
    SLOT_PRESENT,
    SLOT_SWAPPED,
    USER_FILE,
    USER_HUGETLB,
    GiB,
)
from kmm.stress import Stress
from kmm.used_pages import NR_LRU_LISTS, live_entries, used_pages, zones_of
from tests.conftest import two_nodes

MARKS = (PG_LRU, PG_ACTIVE, PG_MLOCKED, PG_DIRTY, PG_WRITEBACK)


@pytest.fixture(scope="module")
def aged() -> Machine:
    """A machine with all sorts of users and a past."""
    run = Stress(seed=11, size=4 * GiB, used=GiB)
    assert run.run(150, 150) is None
    return run.player.m


def classes_of(m: Machine) -> dict[tuple[int, ...], int]:
    """Pages of each class, counted one by one."""
    pages, _ = used_pages(m)
    mapped = {number: user.mapped for number, user in m.memmap_engine.page_users().items()}
    found: dict[tuple[int, ...], int] = {}
    for at, zone in enumerate(zones_of(m, pages.pfn).tolist()):
        flags = int(pages.flags[at])
        what = (zone, int(pages.kind[at]), int(mapped[int(pages.user[at])]), int(pages.huge[at]))
        key = (*what, *(int(flags & mark != 0) for mark in MARKS))
        found[key] = found.get(key, 0) + int(pages.pages[at])
    return found


def test_classes_are_those_of_all_records(aged: Machine) -> None:
    faults, _, classes = Recount(aged.memmap_engine).pages()
    assert faults == (-1,) * 5
    found = {}
    for zone, number in np.argwhere(classes).tolist():
        bits = (number >> 7, *(number >> shift & 1 for shift in range(6, -1, -1)))
        found[(zone, *bits)] = int(classes[zone, number])
    assert found == classes_of(aged)
    assert {key[1] for key in found} >= {*range(1, 10), USER_HUGETLB}
    aged.validate()


def test_entries_are_those_of_all_lists_and_no_page_lacks_one(aged: Machine) -> None:
    recount = Recount(aged.memmap_engine)
    pages, _ = used_pages(aged)
    total = 0
    for nid in aged.nodes:
        for lru in range(NR_LRU_LISTS):
            at, nr_live = live_entries(aged, pages, nid, lru)
            assert recount.lru_entries(nid, lru) == (len(at), nr_live)
            assert recount.lru_entries(nid, lru) == (0, nr_live)  # a second entry of a page
            total += len(at)
    assert total > 10_000
    _, missing, _ = recount.pages()
    assert (missing == -1).all()
    # Without the lists, every page of theirs lacks an entry.
    _, missing, _ = Recount(aged.memmap_engine).pages()
    for nid in aged.nodes:
        for lru in range(NR_LRU_LISTS):
            at, _ = live_entries(aged, pages, nid, lru)
            assert missing[nid, lru] == (pages.pfn[at].min() if len(at) else -1)


def test_slots_are_counted(aged: Machine) -> None:
    recount = Recount(aged.memmap_engine)
    for user in aged.memmap_engine.page_users().values():
        present = int(np.count_nonzero(user.slots & np.uint64(SLOT_PRESENT)))
        swapped = int(np.count_nonzero(user.slots & np.uint64(SLOT_SWAPPED)))
        assert recount.slots(user) == (present, swapped, (-1, -1, -1, -1))


def test_a_record_that_names_a_user_who_is_not_there_is_looked_up_nowhere() -> None:
    m = two_nodes()
    m.alloc_pages()
    pfn = m.alloc_pages()
    for user in (0, 1, 7, 0xFFFF):
        m.memmap["flags"][pfn] |= 1 << 8
        m.memmap["prev"][pfn] = user & 0xFF
        m.memmap["prev_hi"][pfn] = user >> 8
        m.memmap["next"][pfn] = 0xFFFFFFFF
        (_, not_held, *_), _, classes = Recount(m.memmap_engine).pages()
        assert not_held == pfn
        assert classes.sum() == 1
    m.memmap[pfn] = 0
    m.validate()


def test_what_is_not_there_is_refused() -> None:
    m, other = two_nodes(), two_nodes()
    recount = Recount(m.memmap_engine)
    for nid, lru in ((-1, 0), (99, 0), (0, -1), (0, NR_LRU_LISTS)):
        with pytest.raises(ValueError, match=f"lru_entries: node {nid}, list {lru}"):
            recount.lru_entries(nid, lru)
    user = PageUser(m.memmap_engine, USER_FILE, 3)
    assert recount.slots(user) == (0, 0, (-1, -1, -1, -1))
    with pytest.raises(ValueError, match="has ended or is another machine's"):
        Recount(other.memmap_engine).slots(user)
    user.close()
    with pytest.raises(ValueError, match="slots: user 0 has ended"):
        recount.slots(user)
    beyond = np.array([1 << 50, -1], dtype=np.int64)
    assert taken_pages(m.memmap_engine, beyond) == 0
    m.validate()
