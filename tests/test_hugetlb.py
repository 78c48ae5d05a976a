"""The pools' files after each step of recordings, and their pages in the records."""

from __future__ import annotations

import re

import numpy as np
import pytest

from kmm import Machine, _hugetlb
from kmm.errors import ImpossibleState
from kmm.hugetlb import enqueue_huge_page, remove_hugetlb_page
from kmm.hugetlbfs import HugetlbUser
from kmm.replay import boot_machine, play_step
from kmm.running_system import RunningSystem
from kmm.vmstat import all_vm_events
from tests.conftest import recording
from tests.huge import GIB1, counts, machine, set_pool

FILE = re.compile(r"(/sys/\S*/hugepages-\d+kB/\w+) (\d+)$")
EVENT = re.compile(r"((?:htlb|pgmigrate)_\w+) (\d+)$")


def shown(lines: list[str], pattern: re.Pattern[str]) -> dict[str, int]:
    matches = (pattern.match(line) for line in lines)
    return {match[1]: int(match[2]) for match in matches if match}


@pytest.mark.parametrize(
    "name", ["hugetlb_gigantic", "hugetlb_kernel", "hugetlb_reserved", "hugetlb_used"]
)
def test_pools_show_what_they_showed(name: str) -> None:
    """Expect every file of every pool, and what was counted, after every step that read them."""
    real = recording(name)
    m = boot_machine(real)
    system = RunningSystem(m)
    compared = 0
    before: dict[str, int] | None = None
    for i, step in enumerate(real["steps"][1:], 1):
        play_step(m, step["step"])
        system.run()
        files = shown(step.get("out", []), FILE)
        for path, value in files.items():
            assert int(m.read(path)) == value, f"step {i}: {path}"
        events = shown(step.get("out", []), EVENT)
        if events:
            have = all_vm_events(m)
            # The boot step does not tell what was counted before.
            before = before or {k: n - have[k] for k, n in events.items()}
            assert {k: have[k] + before[k] for k in events} == events, f"step {i}"
        compared += len(files)
    assert compared > 100
    m.validate()


def corrupt_count(m: Machine) -> None:
    m.default_hstate.nr_huge_pages_node[1] += 1


def corrupt_surplus(m: Machine) -> None:
    m.default_hstate.surplus_huge_pages_node[1] = 9


def corrupt_reserved(m: Machine) -> None:
    m.default_hstate.resv_huge_pages = 1


def corrupt_marks(m: Machine) -> None:
    m.pageblocks["flags"][next(iter(m.default_hstate.free[1])) >> 9] |= 1 << 9


def corrupt_list(m: Machine) -> None:
    m.default_hstate.free[1].popitem()
    m.default_hstate.nr_huge_pages_node[1] -= 1


def corrupt_node(m: Machine) -> None:
    pfn, slot = m.default_hstate.free[1].popitem()
    m.default_hstate.free[0][pfn] = slot


@pytest.mark.parametrize(
    "act",
    [
        corrupt_count,
        corrupt_surplus,
        corrupt_reserved,
        corrupt_marks,
        corrupt_list,
        corrupt_node,
    ],
)
def test_validate_sees_a_pool_that_is_wrong(act) -> None:
    m = machine()
    set_pool(m, 4, 1)
    m.validate()
    act(m)
    with pytest.raises(AssertionError, match="huge"):
        m.validate()


def test_a_page_that_is_not_where_its_list_says_stops_the_machine() -> None:
    m = machine()
    h = m.default_hstate
    set_pool(m, 2, 1)
    first, second = h.free[1]
    h.free[1][first], h.free[1][second] = h.free[1][second], h.free[1][first]
    with pytest.raises(ImpossibleState, match="remove_hugetlb_page"):
        remove_hugetlb_page(m, h, first, False)


def test_broken_pages_are_not_given_to_users() -> None:
    m = machine()
    h = m.default_hstate
    set_pool(m, 2, 1)
    first, second = h.free[1]
    m.hwpoison.add(second)
    user = HugetlbUser(m, "file", 1, reserve=False)
    user.fault(0, 1)
    assert user.pfns().tolist() == [first]
    m.hwpoison.clear()
    m.validate()


def test_heads_are_found_in_ranges_of_any_bounds() -> None:
    m = machine("kernel")
    set_pool(m, 5, 1)
    pages = sorted(m.default_hstate.free[1])
    engine = m.memmap_engine
    assert _hugetlb.hugetlb_heads(engine, pages[0], pages[-1] + 1) == pages
    assert _hugetlb.hugetlb_heads(engine, pages[0] + 1, pages[-1]) == pages[1:-1]
    which = np.zeros(3, dtype=np.uint8)
    pfns = np.array([pages[0], pages[0] + 1, pages[2]], dtype=np.uint64)
    assert _hugetlb.mark_hugetlb(engine, pfns, which) == 2
    assert which.tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="different lengths"):
        _hugetlb.mark_hugetlb(engine, pfns, which[:2])
    m.validate()


def test_the_engine_refuses_what_is_no_huge_page() -> None:
    m = machine("kernel", GIB1)
    h = m.default_hstate
    set_pool(m, 2, 1)
    first, second = h.free[1]
    single = m.alloc_pages(0, 0xCC0, 1)
    with pytest.raises(ValueError, match="no isolated huge page"):
        _hugetlb.move_hugetlb(m, first, second)
    with pytest.raises(ValueError, match="destroy_compound_gigantic_page"):
        _hugetlb.destroy_compound_gigantic_page(m, first)
    for pfn, order in ((single & ~511, 9), (first, 9), (first + 1, 9), (first, 3)):
        with pytest.raises(ValueError, match="prep_compound_gigantic_page"):
            _hugetlb.prep_compound_gigantic_page(m, pfn, order)
    assert not _hugetlb.isolate_hugetlb(m.memmap_engine, first)
    assert not _hugetlb.isolate_hugetlb(m.memmap_engine, single)
    m.validate()


def test_pages_are_taken_last_come_first_served() -> None:
    m = machine()
    h = m.default_hstate
    set_pool(m, 3, 1)
    pages = list(h.free[1])
    h.drop(1, pages[0])
    enqueue_huge_page(m, h, pages[0])
    assert list(h.free[1]) == [pages[1], pages[2], pages[0]]
    assert counts(h) == (3, 3, 0, 0)
    m.validate()
