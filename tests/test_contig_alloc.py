"""Ranges that are asked for by address, and many pages in a row."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmm import GFP_HIGHUSER_MOVABLE, GFP_KERNEL, KernelError, Machine
from kmm.contig_alloc import alloc_contig_pages, alloc_contig_range
from kmm.errors import Busy, OutOfMemory
from kmm.gfp import __GFP_THISNODE
from kmm.memory import User
from kmm.mempolicy import new_policy
from kmm.mmzone import Zone
from kmm.params import FILL_RESERVED, PG_DIRTY, PG_PINNED
from kmm.snapshot import dump
from kmm.vmstat import all_vm_events, node_items
from tests.conftest import DIMM, two_nodes, with_nobody_to_kill
from tests.tampering import writable

START = DIMM >> 12


def kernel_zone() -> tuple[Machine, Zone]:
    m = two_nodes("memhp_default_state=online_kernel")
    m.plug("a", 1, DIMM, 2 << 27)
    return m, m.nodes[1].zone(2)


@settings(max_examples=60, deadline=None)
@given(first=st.integers(0, 5000), count=st.integers(1, 6000))
def test_exactly_the_range_is_taken_and_given_back(first: int, count: int) -> None:
    m, zone = kernel_zone()
    start, end = START + first, START + first + count
    m.alloc_contig_range(start, end)
    assert zone.nr_free_pages == zone.managed_pages - count
    free = m.kpageflags(START, 12288) == 1 << 10
    assert not free[first : first + count].any()
    assert free[:first].all()
    assert free[first + count :].all()
    m.validate()
    m.free_contig_range(start, count)
    zone.drain()
    assert zone.nr_free()[10] == 64
    m.validate()


def test_a_page_in_use_is_in_the_way() -> None:
    m, zone = kernel_zone()
    kernel = m.alloc_pages(0, GFP_KERNEL, 1)
    movable = m.alloc_pages(0, GFP_HIGHUSER_MOVABLE, 1)
    for pfn in (kernel, movable):
        with pytest.raises(KernelError) as e:
            m.alloc_contig_range(pfn, pfn + 2000)
        assert e.value.errno == errno.EBUSY
        m.validate()
    assert zone.nr_isolate_pageblock == 0
    for pfn in (kernel, movable):
        m.free_pages(pfn)
    zone.drain()
    assert zone.nr_free_pages == zone.managed_pages
    m.validate()


def test_what_lies_beside_a_used_page_can_be_taken() -> None:
    m, zone = kernel_zone()
    used = m.alloc_pages(0, GFP_KERNEL, 1)
    m.alloc_contig_range(used + 100, used + 200)
    m.validate()
    m.free_pages(used)
    m.free_contig_range(used + 100, 100)
    zone.drain()
    assert zone.nr_free_pages == zone.managed_pages
    m.validate()


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (START - 10, START + 10),
        (START, START),
        (5, 3),
        (-1, 4),
        (START, START + (3 << 15)),
        (0, 1 << 40),
    ],
)
def test_ranges_that_are_not_there_are_refused(start: int, end: int) -> None:
    m, _ = kernel_zone()
    before = dump(m)
    with pytest.raises(KernelError) as e:
        m.alloc_contig_range(start, end)
    assert e.value.errno == errno.EINVAL
    assert dump(m) == before


@pytest.mark.parametrize(
    ("start", "end", "words"),
    [
        (5, 4, "end: 4; allowed: a number from 6 to 17179869184"),
        (0, 0, "end: 0; allowed: a number from 1 to"),
        (-1, 4, "start: -1; allowed: a number from 0 to 17179869183"),
        (1 << 34, 5, "start: 17179869184; allowed: a number from 0 to"),
        (0, 1 << 40, "end: 1099511627776; allowed: a number from 1 to 17179869184"),
        (0, "x", "end: 'x'; allowed"),
    ],
)
def test_the_end_of_a_range_lies_behind_its_start(start: int, end: int, words: str) -> None:
    m, _ = kernel_zone()
    with pytest.raises(KernelError, match=words):
        m.alloc_contig_range(start, end)


def test_pages_in_a_row_are_found_behind_what_is_used() -> None:
    m, _zone = kernel_zone()
    m.alloc_pages_bulk(3, 10, GFP_KERNEL, 1)
    pfn = alloc_contig_pages(m, 3000, GFP_KERNEL, 1)
    assert pfn == START + 4096
    m.free_contig_range(pfn, 3000)
    with pytest.raises(KernelError) as e:
        alloc_contig_pages(m, 1 << 20, GFP_KERNEL, 1)
    assert e.value.errno == errno.ENOMEM
    m.validate()


def test_the_range_keeps_the_type_that_was_asked_for() -> None:
    m, _zone = kernel_zone()
    alloc_contig_range(m, START, START + 700, 0)
    types = [m.memmap_engine.get_pageblock_migratetype(START + i * 512) for i in range(3)]
    assert types == [0, 0, 1]
    m.free_pages_bulk(np.arange(START, START + 700, dtype=np.uint64))
    m.validate()


def test_a_refusal_leaves_pageblocks_of_the_type_asked_for() -> None:
    m, _zone = kernel_zone()
    first, used = m.alloc_pages(10, nid=1), m.alloc_pages(10, nid=1)
    m.free_pages(first, 10)
    with pytest.raises(KernelError) as e:
        alloc_contig_range(m, first + 5, used + 2048 - 5, 2)
    assert e.value.errno == errno.EBUSY
    # The first and the last pageblock were isolated before one between them refused.
    types = [m.memmap_engine.get_pageblock_migratetype(first + i * 512) for i in range(6)]
    assert [types[0], types[5]] == [2, 2]
    m.validate()


def test_ranges_with_reserved_pages_are_not_tried() -> None:
    m = two_nodes()
    zone = m.nodes[0].zone(1)
    free = zone.free_list(10, 1)
    reserved = np.flatnonzero(m.pageblocks["state"] & 0x7F == FILL_RESERVED) * 512
    size = 1 << 14
    candidate = int(reserved[reserved > free[-1]][0]) // size * size
    assert candidate < free[-1]
    m.alloc_pages_bulk(sum(pfn < candidate for pfn in free), 10)
    before = dump(m)
    with pytest.raises(KernelError) as e:
        alloc_contig_pages(m, size, GFP_KERNEL, 0)
    assert e.value.errno == errno.ENOMEM
    assert dump(m) == before


def test_the_last_page_of_all_can_be_in_the_range() -> None:
    m = two_nodes("memhp_default_state=online_kernel", maxmem="64T")
    end = (1 << 46) - (1 << 27)
    m.plug("top", 1, end, 1 << 27)
    m.alloc_contig_range((1 << 34) - 100, 1 << 34)
    m.free_contig_range((1 << 34) - 100, 100)


def used_by(m: Machine, kind: str, pages: int, **more: object) -> User:
    policy = new_policy(m, "bind", [1])
    user = User(m, kind, kind, pages, policy=policy, tokens=True, **more)  # type: ignore[arg-type]
    user.grow(pages)
    user.write_tokens(0, np.arange(pages) + 7)
    return user


def holds(user: User) -> bool:
    return user.read_tokens(0, user.pages).tolist() == [n + 7 for n in range(user.pages)]


@pytest.mark.parametrize("zone", ["kernel", "movable"])
@pytest.mark.parametrize(
    ("kind", "thp"), [("anon", "never"), ("anon", "madvise"), ("shmem", "never")]
)
def test_what_is_used_moves_and_stays_on_its_node(zone: str, kind: str, thp: str) -> None:
    m = two_nodes(f"memhp_default_state=online_{zone}")
    m.plug("a", 1, DIMM, 2 << 27)
    user = used_by(m, kind, 1024, thp=thp)
    start = int(user.pfns().min())
    start, end = start + 100, start + 700
    m.alloc_contig_range(start, end)
    assert not ((user.pfns() >= start) & (user.pfns() < end)).any()
    assert (user.pfns() >= START).all()
    assert holds(user)
    moved = all_vm_events(m)["pgmigrate_success"]
    assert moved == 600 if thp == "never" else moved >= 1024
    m.validate()
    m.free_contig_range(start, end - start)
    assert user.release(0, 1024) == 1024
    m.validate()


def test_lists_of_32_pages_and_five_tries() -> None:
    m, _ = kernel_zone()
    user = used_by(m, "anon", 100)
    start = int(user.pfns().min())
    held = int(user.pfns()[40])
    m.memmap["flags"][held] |= PG_PINNED
    with pytest.raises(Busy, match=f"pfn {held:#x} is in use"):
        m.alloc_contig_range(start, start + 100)
    events = all_vm_events(m)
    # The second list was tried five times for the page that is held, and the next one not at all.
    assert events["pgmigrate_success"] == 63
    assert events["pgmigrate_fail"] == 5
    assert holds(user)
    m.validate()
    m.memmap["flags"][held] ^= PG_PINNED
    m.alloc_contig_range(start, start + 100)
    assert holds(user)
    m.validate()


def test_clean_page_cache_is_dropped_and_dirty_moves() -> None:
    m, _ = kernel_zone()
    user = used_by(m, "file", 64)
    m.sync()
    pfns = user.pfns()
    assert node_items(m, m.nodes[1])["nr_file_pages"] == 64
    dirty = User(m, "dirty", "file", 5, policy=new_policy(m, "bind", [1]), tokens=True)
    dirty.fault(0, 5, PG_DIRTY)
    start, end = int(pfns.min()), int(dirty.pfns().max()) + 1
    m.alloc_contig_range(start, end)
    assert (user.pfns() == -1).all()
    assert (dirty.pfns() >= 0).all()
    assert holds(user)
    assert node_items(m, m.nodes[1])["nr_file_pages"] == 5
    assert node_items(m, m.nodes[1])["nr_isolated_file"] == 0
    assert all_vm_events(m)["pgmigrate_success"] == 5
    m.validate()


def test_a_signal_ends_it_and_everything_is_on_its_list_again() -> None:
    m, zone = kernel_zone()
    user = used_by(m, "anon", 100)
    start = int(user.pfns().min())
    m.signal_pending = True
    with pytest.raises(KernelError, match="a signal came") as e:
        m.alloc_contig_range(start, start + 100)
    assert e.value.errno == errno.EINTR
    assert zone.nr_isolate_pageblock == 0
    assert node_items(m, m.nodes[1])["nr_isolated_anon"] == 0
    assert node_items(m, m.nodes[1])["nr_inactive_anon"] == 100
    assert holds(user)
    m.validate()


def test_no_room_is_enomem_and_what_has_moved_stays_there() -> None:
    m, zone = kernel_zone()
    with_nobody_to_kill(m)
    user = used_by(m, "anon", 1000)
    hog = User(m, "hog", "anon", m.totalram_pages)
    with pytest.raises(OutOfMemory):
        hog.grow(hog.pages)
    start = int(user.pfns().min())
    with pytest.raises(KernelError, match="has nowhere to go") as e:
        m.alloc_contig_range(start, start + 1000)
    assert e.value.errno == errno.ENOMEM
    assert zone.nr_isolate_pageblock == 0
    assert holds(user)
    m.validate()
    hog.close()
    m.alloc_contig_range(start, start + 1000)
    assert holds(user)
    m.validate()


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["anon", "shmem", "file", "driver_movable"]), max_size=4),
    first=st.integers(0, 3000),
    count=st.integers(1, 3000),
)
def test_any_range_of_movable_pages_can_be_had(kinds: list[str], first: int, count: int) -> None:
    m, _ = kernel_zone()
    users = []
    for i, kind in enumerate(kinds):
        user = User(m, f"u{i}", kind, 700, policy=new_policy(m, "bind", [1]), tokens=True)
        user.grow(700)
        user.write_tokens(0, np.arange(700) + 7)
        if kind == "file":
            writable(user.engine.store)[:] = np.arange(700) + 7
        users.append(user)
    start, end = START + first, START + first + count
    m.alloc_contig_range(start, end)
    for user in users:
        assert not ((user.pfns() >= start) & (user.pfns() < end)).any()
        assert holds(user)
    m.validate()


def test_the_first_range_in_a_row_has_no_huge_page_in_it() -> None:
    m, _ = kernel_zone()
    m.write("/sys/devices/system/node/node1/hugepages/hugepages-2048kB/nr_hugepages", "3")
    pages = m.default_hstate.free[1]
    pfn = alloc_contig_pages(m, 1024, GFP_KERNEL | __GFP_THISNODE, 1)
    assert not any(pfn <= page < pfn + 1024 for page in pages)
    assert m.default_hstate.nr_huge_pages == 3
    with pytest.raises(OutOfMemory):
        alloc_contig_pages(m, 1024, GFP_KERNEL, 1, nodemask=[])
    m.validate()
