"""What /proc/kpageflags shows of pages in use; the words are those that a real 6.1 showed."""

from __future__ import annotations

import numpy as np
import pytest

from kmm import Machine
from kmm.memory import User
from kmm.mempolicy import new_policy
from kmm.params import PG_DIRTY, PG_HWPOISON, PG_REFERENCED, PG_WRITEBACK
from tests.conftest import DIMM, two_nodes

HUGE_HEAD, HUGE_TAIL = 0x40040D828, 0x411800


def machine() -> Machine:
    m = two_nodes("memhp_default_state=online_movable")
    m.plug("a", 1, DIMM, 256 << 20)
    return m


def on_second(m: Machine, kind: str, pages: int, **more: object) -> User:
    policy = new_policy(m, "bind", [1])
    return User(m, kind, kind, pages, policy=policy, **more)  # type: ignore[arg-type]


def words(m: Machine, user: User) -> set[int]:
    """What the pages of a user show, all of them."""
    n = 1 << user.engine.order
    return {int(w) for pfn in user.pfns() if pfn >= 0 for w in m.kpageflags(int(pfn), n)}


def test_anonymous_pages() -> None:
    m = machine()
    user = on_second(m, "anon", 50)
    user.grow(50)
    assert words(m, user) == {0x400005828}
    m.write("/sys/devices/system/memory/memory32/state", "offline")
    m.write("/sys/devices/system/memory/memory33/state", "offline")
    assert words(m, user) == {0x400005838}, "what has moved is dirty"
    m.validate()


def test_mlocked_pages() -> None:
    m = machine()
    user = on_second(m, "anon", 50)
    user.engine.locked = True
    user.grow(50)
    assert words(m, user) == {0x60004582C}
    m.validate()


def test_a_huge_page_and_its_parts() -> None:
    m = machine()
    user = on_second(m, "anon", 1024, thp="always")
    user.grow(1024)
    head = int(user.pfns()[512])
    shown = m.kpageflags(head - 3, 520).tolist()
    assert shown[3] == HUGE_HEAD
    assert shown[4:515] == [HUGE_TAIL] * 511
    user.engine.split(m, 700)
    assert m.kpageflags(head, 512).tolist() == [0x400005838] * 512
    m.validate()


@pytest.mark.parametrize("at, n", [(1, 5), (0, 1), (511, 2), (300, 212)])
def test_any_part_of_a_huge_page_can_be_asked_for(at: int, n: int) -> None:
    m = machine()
    user = on_second(m, "anon", 512, thp="always")
    user.grow(512)
    head = int(user.pfns()[0])
    whole = m.kpageflags(head, 1024)
    assert (m.kpageflags(head + at, n) == whole[at : at + n]).all()
    m.validate()


def test_tmpfs_pages() -> None:
    m = machine()
    user = on_second(m, "shmem", 50)
    user.grow(50)
    assert words(m, user) == {0x403C}
    m.validate()


@pytest.mark.parametrize(
    "marks, mapped, word",
    [
        (PG_DIRTY, False, 0x800000038),
        (PG_REFERENCED, False, 0x40000002C),
        (0, True, 0x400000828),
        (PG_WRITEBACK, False, 0x800000128),
    ],
)
def test_file_pages(marks: int, mapped: bool, word: int) -> None:
    m = machine()
    user = on_second(m, "file", 50)
    user.engine.mapped = mapped
    user.fault(0, 50, marks)
    assert words(m, user) == {word}
    m.validate()


@pytest.mark.parametrize(
    "kind, order, want",
    [
        ("slab", 0, {0x80}),
        ("slab", 3, {0x8080, 0x10080}),
        ("slab_reclaimable", 1, {0x8080, 0x10080}),
        ("slab", 10, {0x8080, 0x10080}),
        ("page_table", 0, {0x4000000}),
        ("stack", 0, {0}),
        ("kernel", 9, {0}),
        ("offline", 0, {0x800000}),
        ("offline", 9, {0x800000}),
        ("driver_movable", 0, {0}),
    ],
)
def test_pages_of_the_kernel(kind: str, order: int, want: set[int]) -> None:
    m = machine()
    user = User(m, kind, kind, 3, order=order)
    user.grow(3)
    assert words(m, user) == want
    m.validate()


def test_only_the_first_page_of_a_compound_one_is_a_head() -> None:
    m = machine()
    user = User(m, "slab", "slab", 1, order=10)
    user.grow(1)
    head = int(user.pfns()[0])
    assert m.kpageflags(head, 1024).tolist() == [0x8080] + [0x10080] * 1023
    assert m.kpageflags(head + 600, 1).tolist() == [0x10080]
    m.validate()


def test_a_broken_page_shows_it_beside_what_it_is() -> None:
    m = machine()
    user = User(m, "slab", "slab", 3)
    user.grow(3)
    pfn = int(user.pfns()[1])
    m.memmap_engine.set_page_flags(pfn, int(m.memmap["flags"][pfn]) | PG_HWPOISON)
    assert m.kpageflags(pfn, 1).tolist() == [0x80080]
    m.validate()


def test_runs_are_the_same_words() -> None:
    from kmm import _page_flags

    m = machine()
    for kind, order in (("slab", 2), ("page_table", 0), ("slab_reclaimable", 10)):
        User(m, kind, kind, 5, order=order).grow(5)
    on_second(m, "anon", 2000, thp="always").grow(1700)
    on_second(m, "file", 99).grow(99)
    for start, n in ((DIMM >> 12, 65536), (0, 0x40000)):
        lengths, values = np.zeros(100000, np.uint64), np.zeros(100000, np.uint64)
        k, end = _page_flags.kpageflags_runs(m.memmap_engine, start, start + n, lengths, values)
        assert end == start + n
        runs = np.repeat(values[:k], lengths[:k].astype(np.int64))
        assert (runs == m.kpageflags(start, n)).all()
    m.validate()
