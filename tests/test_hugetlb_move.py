"""Huge pages leave blocks that go offline, and ranges that somebody wants as a whole."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from kmm import KernelError, Machine
from kmm._migrate import isolate_range, putback_movable_pages
from kmm.clock import SECOND
from kmm.errors import Busy
from kmm.hugetlb_move import (
    dissolve_free_huge_page,
    dissolve_free_huge_pages,
    isolate_or_dissolve_huge_page,
)
from kmm.hugetlbfs import HugetlbUser
from kmm.memory import User
from kmm.mempolicy import new_policy
from kmm.params import PG_PINNED
from kmm.vmstat import all_vm_events
from tests.conftest import DIMM
from tests.huge import GIB1, STATE, counts, machine, set_pool

FIRST = DIMM >> 12


def used(m: Machine, pages: int, touched: int, size: int | None = None) -> HugetlbUser:
    policy = new_policy(m, "bind", [1])
    user = HugetlbUser(m, "file", pages, size=size, policy=policy, tokens=True)
    user.fault(0, touched)
    user.write_tokens(0, np.arange(touched) + 7)
    return user


def holds(user: HugetlbUser, touched: int) -> bool:
    return user.read_tokens(0, touched).tolist() == [n + 7 for n in range(touched)]


def set_flags(m: Machine, pfn: int, flags: int, on: bool) -> None:
    have = int(m.pageblocks["flags"][pfn >> 9])
    m.pageblocks["flags"][pfn >> 9] = have | flags if on else have & ~flags


def test_free_ones_dissolve_and_the_pool_is_smaller_for_good() -> None:
    m = machine()
    set_pool(m, 10, 1)
    m.write(STATE % 32, "offline")
    assert counts(m.default_hstate) == (0, 0, 0, 0)
    assert m.read("/proc/sys/vm/nr_hugepages") == "0\n"
    m.validate()


def test_reserved_ones_keep_a_block_online() -> None:
    m = machine()
    set_pool(m, 10, 1)
    user = used(m, 10, 0)
    with pytest.raises(KernelError, match="all 10 free ones are reserved") as e:
        m.write(STATE % 32, "offline")
    assert e.value.errno == errno.EBUSY
    assert m.read(STATE % 32) == "online\n"
    assert counts(m.default_hstate) == (10, 10, 10, 0)
    m.validate()
    user.close()
    m.write(STATE % 32, "offline")
    assert counts(m.default_hstate) == (0, 0, 0, 0)
    m.validate()


def test_as_many_as_are_not_reserved_dissolve_before_it_fails() -> None:
    m = machine()
    set_pool(m, 10, 1)
    used(m, 4, 0)
    with pytest.raises(Busy):
        m.write(STATE % 32, "offline")
    assert counts(m.default_hstate) == (4, 4, 4, 0)
    m.validate()


@pytest.mark.parametrize("zone", ["movable", "kernel"])
def test_used_ones_move_to_fresh_pages_of_another_node(zone: str) -> None:
    m = machine(zone)
    set_pool(m, 5, 1)
    user = used(m, 5, 5)
    block = int(user.pfns()[0]) >> 15
    m.write(STATE % block, "offline")
    assert (user.pfns() < FIRST).all()
    assert holds(user, 5)
    assert counts(m.default_hstate) == (5, 0, 0, 0)
    assert m.default_hstate.nr_huge_pages_node == {0: 5, 1: 0}
    assert m.default_hstate.max_huge_pages == 5
    events = all_vm_events(m)
    assert events["pgmigrate_success"] == 5 * 512
    assert events["htlb_buddy_alloc_success"] == 10
    m.validate()
    user.close()
    assert m.default_hstate.free_huge_pages == 5
    m.validate()


def test_free_pages_of_the_pool_are_taken_first() -> None:
    m = machine()
    set_pool(m, 5, 1)
    user = used(m, 5, 5)
    set_pool(m, 3, 0)
    m.write(STATE % 32, "offline")
    # Three went into the pool's pages, whose place the old ones take, which then dissolve.
    assert m.default_hstate.nr_huge_pages_node == {0: 5, 1: 0}
    assert counts(m.default_hstate) == (5, 0, 0, 0)
    assert m.default_hstate.max_huge_pages == 5
    assert holds(user, 5)
    m.validate()


def test_surplus_goes_along_to_the_new_node() -> None:
    m = machine()
    set_pool(m, 5, 1)
    user = used(m, 5, 5)
    set_pool(m, 2)
    assert m.default_hstate.surplus_huge_pages_node == {0: 0, 1: 3}
    m.write(STATE % 32, "offline")
    assert m.default_hstate.surplus_huge_pages_node == {0: 3, 1: 0}
    m.validate()
    user.close()
    assert counts(m.default_hstate) == (2, 2, 0, 0)
    m.validate()


def test_with_nowhere_to_go_it_waits_until_patience_ends() -> None:
    m = machine()
    set_pool(m, 5, 1)
    user = used(m, 5, 5)
    hog = [m.alloc_pages(0, 0x100CCA, 0)]
    while (pfn := m._request(0x100CCA, 8, 0, 1, 0)) >= 0:
        hog.append(pfn)
    with pytest.raises(KernelError, match="nowhere to go; given up after 60 s") as e:
        m.write(STATE % 32, "offline")
    assert e.value.errno == errno.EINTR
    assert holds(user, 5)
    assert m.default_hstate.nr_huge_pages_node == {0: 0, 1: 5}
    m.validate()

    def make_room() -> None:
        for pfn in hog[1:]:
            m.free_pages(pfn, 8)

    m.clock.call_after(3 * SECOND, make_room)
    m.write(STATE % 32, "offline")
    assert holds(user, 5)
    m.validate()


def test_a_pinned_one_is_tried_ten_times_and_stays() -> None:
    m = machine()
    set_pool(m, 2, 1)
    user = used(m, 2, 2)
    pfn = int(user.pfns()[0])
    set_flags(m, pfn, PG_PINNED, True)
    before = m.read("/proc/buddyinfo").splitlines()[:-1]
    m.offline_patience = 0
    with pytest.raises(KernelError, match="held by somebody"):
        m.write(STATE % 32, "offline")
    assert user.pfns()[0] == pfn
    assert user.pfns()[1] < FIRST
    events = all_vm_events(m)
    # Once with the other page, and once more without.
    assert events["htlb_buddy_alloc_success"] == 2 + 1 + 2 * 10
    assert events["pgmigrate_fail"] == 2 * 512
    assert len(before) == 2
    m.validate()
    assert user.release(0, 2) == 1
    set_flags(m, pfn, PG_PINNED, False)
    m.write(STATE % 32, "offline")
    assert user.pfns()[0] < FIRST
    m.validate()


def test_a_huge_page_in_use_is_not_dissolved() -> None:
    m = machine()
    set_pool(m, 2, 1)
    user = used(m, 1, 1)
    with pytest.raises(Busy, match="'file', page 0 is in use"):
        dissolve_free_huge_page(m, int(user.pfns()[0]))
    with pytest.raises(Busy):
        dissolve_free_huge_pages(m, FIRST, FIRST + 2048)
    assert counts(m.default_hstate)[0] == 2 - (int(user.pfns()[0]) > FIRST)
    m.validate()


def test_thp_blocks_a_kernel_zone_only_while_it_is_off_its_list() -> None:
    m = machine("kernel")
    thp = User(m, "thp", "anon", 512, policy=new_policy(m, "bind", [1]), thp="madvise")
    thp.grow(512)
    kernel = m.alloc_pages(9, 0xCC0, 1)
    with pytest.raises(Busy, match="is unmovable"):
        m.write(STATE % (kernel >> 15), "offline")
    m.free_pages(kernel, 9)
    pfn = int(thp.pfns()[0])
    out = np.zeros(1, dtype=np.uint64)
    assert isolate_range(m.memmap_engine, pfn, pfn + 1, out, out.copy())[0] == 1
    with pytest.raises(Busy, match=f"pfn {pfn:#x} is unmovable"):
        m.write(STATE % (pfn >> 15), "offline")
    putback_movable_pages(m.memmap_engine, out)
    m.write(STATE % (pfn >> 15), "offline")
    assert (thp.pfns() < FIRST).all()
    m.validate()


# -- gigantic pages ------------------------------------------------------------------------


def test_gigantic_pages_stay_out_of_movable_zones() -> None:
    m = machine("movable", 2 * GIB1)
    set_pool(m, 1, 1, 1 << 20)
    assert counts(m.hstates[0]) == (0, 0, 0, 0)
    m.validate()


def test_only_the_last_block_of_a_gigantic_page_can_dissolve_it() -> None:
    m = machine("kernel", 2 * GIB1)
    big = m.hstates[0]
    set_pool(m, 2, 1, 1 << 20)
    for block in (33, 38):
        with pytest.raises(Busy, match="pfn 0x100000 is huge, and reaches beyond"):
            m.write(STATE % block, "offline")
        assert counts(big) == (2, 2, 0, 0)
        m.validate()
    m.write(STATE % 39, "offline")
    assert counts(big) == (1, 1, 0, 0)
    m.validate()
    # What was its other blocks' is free now.
    m.write(STATE % 38, "offline")
    m.validate()


def test_a_gigantic_page_in_use_moves_to_a_free_one_only() -> None:
    m = machine("kernel", 2 * GIB1)
    big = m.hstates[0]
    set_pool(m, 2, 1, 1 << 20)
    user = used(m, 1, 1, GIB1)
    last = (int(user.pfns()[0]) + (1 << 18) >> 15) - 1
    m.offline_patience = 0
    with pytest.raises(KernelError, match="nowhere to go"):
        m.write(STATE % last, "offline")
    assert counts(big) == (2, 1, 0, 0)
    m.validate()
    # A node whose memory comes later has one to go to.
    m.plug("b", 0, DIMM + 4 * GIB1, GIB1)
    set_pool(m, 1, 0, 1 << 20)
    m.write(STATE % last, "offline")
    assert holds(user, 1)
    assert int(user.pfns()[0]) == (DIMM + 4 * GIB1) >> 12
    assert counts(big) == (2, 1, 0, 0)
    m.validate()


# -- ranges as a whole ---------------------------------------------------------------------


def test_a_wanted_range_gets_rid_of_huge_pages() -> None:
    m = machine("kernel")
    h = m.default_hstate
    set_pool(m, 6, 1)
    user = used(m, 1, 1)
    pages = [*h.free[1], *user.pfns().tolist()]
    start, end = min(pages), max(pages) + 512
    with pytest.raises(Busy, match="is in use"):
        m.alloc_contig_range(start, end)
    # The used one has moved to a free one of the pool; the one that it left is in the way.
    assert counts(h) == (6, 5, 0, 0)
    assert holds(user, 1)
    m.validate()
    m.alloc_contig_range(start, end)
    # Free ones are replaced; all stay on their node.
    assert h.nr_huge_pages_node == {0: 0, 1: 6}
    assert counts(h) == (6, 5, 0, 0)
    assert all(not start <= pfn < end for pfn in [*h.free[1], *user.pfns().tolist()])
    assert holds(user, 1)
    m.validate()
    m.free_contig_range(start, end - start)
    m.validate()


def test_a_wanted_range_fails_on_what_cannot_be_replaced() -> None:
    m = machine("kernel", GIB1)
    set_pool(m, 1, 1, 1 << 20)
    with pytest.raises(KernelError, match="is part of a gigantic page") as e:
        m.alloc_contig_range(FIRST + (3 << 15), FIRST + (8 << 15))
    assert e.value.errno == errno.ENOMEM
    with pytest.raises(KernelError, match="is gigantic") as e:
        m.alloc_contig_range(FIRST, FIRST + (8 << 15))
    assert e.value.errno == errno.ENOMEM
    with pytest.raises(Busy):
        m.alloc_contig_range(FIRST, FIRST + 512)
    m.validate()


def test_a_free_huge_page_in_the_way_is_dissolved_and_not_isolated() -> None:
    m = machine("kernel")
    set_pool(m, 3, 1)
    pfn = next(iter(m.default_hstate.free[1]))
    assert not isolate_or_dissolve_huge_page(m, pfn)
    assert counts(m.default_hstate) == (3, 3, 0, 0)
    assert pfn not in m.default_hstate.free[1]
    m.validate()


@pytest.mark.parametrize("pool", [0, 3, 10])
@pytest.mark.parametrize("reserved", [0, 4, 9, 10])
@pytest.mark.parametrize("touched", [0, 3])
def test_the_explanation_of_a_block_agrees_with_the_attempt(
    pool: int, reserved: int, touched: int
) -> None:
    m = machine()
    set_pool(m, 10, 1)
    used(m, reserved, min(touched, reserved))
    set_pool(m, pool, 0)
    told = m.explain_offline(32)
    try:
        m.write(STATE % 32, "offline")
        errnos = [0]
    except KernelError as e:
        errnos = [e.errno]
    assert [o.errno for o in told.obstacles][:1] == [n for n in errnos if n]
    m.validate()
