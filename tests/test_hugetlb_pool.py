"""Pools of huge pages grow and shrink, and keep their accounts."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmm import KernelError, Machine
from kmm.hugetlbfs import HugetlbUser
from kmm.mempolicy import new_policy
from kmm.vmstat import all_vm_events
from tests.huge import BLOCK, NODE_POOL, POOL, STATE, counts, machine, set_pool


def test_nodes_with_memory_take_turns() -> None:
    m = machine()
    h = m.default_hstate
    set_pool(m, 7)
    assert h.nr_huge_pages_node == {0: 4, 1: 3}
    set_pool(m, 10)
    assert h.nr_huge_pages_node == {0: 5, 1: 5}
    # The turn to free is another than the turn to allocate.
    set_pool(m, 7)
    assert h.nr_huge_pages_node == {0: 3, 1: 4}
    m.validate()


def test_a_node_that_has_no_more_is_passed_over() -> None:
    m = machine()
    h = m.default_hstate
    set_pool(m, 10**6, 1)
    full = h.nr_huge_pages_node[1]
    assert 240 <= full <= 4 * BLOCK >> 21
    assert all_vm_events(m)["htlb_buddy_alloc_fail"] == 1
    set_pool(m, full + 6)
    assert h.nr_huge_pages_node == {0: 6, 1: full}
    # Node 1 was asked each time it was its turn.
    assert all_vm_events(m)["htlb_buddy_alloc_fail"] == 7
    assert h.max_huge_pages == full + 6
    m.validate()


def test_many_pages_at_once_are_what_single_ones_would_be() -> None:
    """Expect the same free lists, pages and counts from one write and from many."""
    at_once, singly = machine(), machine()
    set_pool(at_once, 301)
    for n in range(1, 302):
        set_pool(singly, n)
    a, b = at_once.default_hstate, singly.default_hstate
    assert {n: list(p) for n, p in a.free.items()} == {n: list(p) for n, p in b.free.items()}
    assert (a.next_nid_to_alloc, a.next_nid_to_free) == (b.next_nid_to_alloc, b.next_nid_to_free)
    assert at_once.read("/proc/buddyinfo") == singly.read("/proc/buddyinfo")
    assert at_once.read("/proc/zoneinfo") == singly.read("/proc/zoneinfo")
    assert at_once.read("/proc/vmstat") == singly.read("/proc/vmstat")
    at_once.validate()
    singly.validate()


def test_what_is_in_use_or_reserved_becomes_surplus() -> None:
    m = machine()
    h = m.default_hstate
    set_pool(m, 10, 1)
    user = HugetlbUser(m, "file", 6, policy=new_policy(m, "bind", [1]))
    user.fault(0, 2)
    assert counts(h) == (10, 8, 4, 0)
    set_pool(m, 3)
    assert counts(h) == (6, 4, 4, 3)
    assert m.read("/proc/sys/vm/nr_hugepages") == "3\n"
    m.validate()
    # More than are persistent turns surplus pages back first.
    set_pool(m, 5)
    assert counts(h) == (6, 4, 4, 1)
    set_pool(m, 2)
    user.close()
    assert counts(h) == (2, 2, 0, 0)
    m.validate()


def test_overcommit_lets_reservations_allocate() -> None:
    m = machine()
    h = m.default_hstate
    set_pool(m, 2, 1)
    with pytest.raises(KernelError, match="3 pages to reserve; 2 are free, 0 reserved") as e:
        HugetlbUser(m, "file", 3)
    assert e.value.errno == errno.ENOMEM
    assert "file" not in m.users
    m.write(POOL % (2048, "nr_overcommit_hugepages"), "2")
    with pytest.raises(KernelError):
        HugetlbUser(m, "file", 5)
    assert counts(h) == (2, 2, 0, 0)
    m.validate()
    user = HugetlbUser(m, "file", 4)
    # Surplus pages come from the node of the CPU.
    assert counts(h) == (4, 4, 4, 2)
    assert h.surplus_huge_pages_node == {0: 2, 1: 0}
    user.fault(0, 4)
    assert counts(h) == (4, 0, 0, 2)
    user.close()
    assert counts(h) == (2, 2, 0, 0)
    m.validate()


def test_a_touch_without_reservation_may_take_a_surplus_page() -> None:
    m = machine()
    m.write("/proc/sys/vm/nr_overcommit_hugepages", "1")
    user = HugetlbUser(m, "file", 3, reserve=False, policy=new_policy(m, "bind", [1]))
    with pytest.raises(KernelError) as e:
        user.fault(0, 3)
    assert e.value.errno == errno.ENOSPC
    assert user.nr_present == 1
    assert m.default_hstate.surplus_huge_pages_node == {0: 0, 1: 1}
    user.close()
    assert counts(m.default_hstate) == (0, 0, 0, 0)
    m.validate()


def test_a_reservation_does_not_help_where_its_nodes_have_none() -> None:
    m = machine()
    set_pool(m, 4, 0)
    user = HugetlbUser(m, "file", 4, policy=new_policy(m, "bind", [1]))
    with pytest.raises(KernelError) as e:
        user.fault(0, 1)
    assert e.value.errno == errno.ENOSPC
    assert counts(m.default_hstate) == (4, 4, 4, 0)
    m.validate()


def test_freed_pages_go_in_the_reverse_order_of_their_leaving_the_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    m = machine()
    set_pool(m, 4, 1)
    pages = list(m.default_hstate.free[1])
    freed: list[int] = []
    monkeypatch.setattr(
        "kmm.hugetlb.__free_pages", lambda m, pfn, order: (freed.append(pfn), m.free_pages(pfn, 9))
    )
    set_pool(m, 0, 1)
    # The last to come is the first to leave, and the last to leave is the first to be freed.
    assert freed == pages
    m.validate()


STEP = st.one_of(
    st.tuples(st.just("pool"), st.integers(0, 40), st.sampled_from([None, 0, 1])),
    st.tuples(st.just("overcommit"), st.integers(0, 6), st.none()),
    st.tuples(st.just("open"), st.integers(0, 12), st.booleans()),
    st.tuples(st.just("touch"), st.integers(0, 3), st.integers(1, 12)),
    st.tuples(st.just("release"), st.integers(0, 3), st.integers(1, 12)),
    st.tuples(st.just("close"), st.integers(0, 3), st.none()),
    st.tuples(st.just("offline"), st.integers(32, 35), st.none()),
    st.tuples(st.just("online"), st.integers(32, 35), st.none()),
)


def do(m: Machine, step: tuple, users: list[HugetlbUser], number: int) -> None:
    op, a, b = step
    if op == "pool":
        set_pool(m, a, b)
    elif op == "overcommit":
        m.write(POOL % (2048, "nr_overcommit_hugepages"), str(a))
    elif op == "open":
        policy = new_policy(m, "interleave", sorted(m.n_memory))
        user = HugetlbUser(m, f"file {number}", a, reserve=b, policy=policy, tokens=True)
        users.append(user)
    elif op in ("offline", "online"):
        m.write(STATE % a, "online_movable" if op == "online" else op)
    elif a < len(users):
        user = users[a]
        if op == "touch":
            user.fault(0, min(b, user.pages))
            there = user.nr_present
            user.write_tokens(0, [number] * min(b, user.pages))
            assert user.nr_present == there
        elif op == "release":
            user.release(0, min(b, user.pages))
        else:
            users.remove(user)
            user.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(STEP, max_size=25))
def test_accounts_agree_whatever_happens(steps: list[tuple]) -> None:
    """Expect validate() to recount each pool, and tokens to stay with their pages."""
    m = machine()
    m.offline_patience = 0
    users: list[HugetlbUser] = []
    for number, step in enumerate(steps, 1):
        held = {user.name: user.read_tokens(0, user.pages).tolist() for user in users}
        try:
            do(m, step, users, number)
        except KernelError as e:
            assert e.errno in (errno.ENOMEM, errno.ENOSPC, errno.EBUSY, errno.EINTR, errno.EINVAL)
        m.validate()
        for user in users:
            if step[0] in ("pool", "offline", "online", "overcommit"):
                assert user.read_tokens(0, user.pages).tolist() == held[user.name]
    for user in users:
        user.close()
    set_pool(m, 0)
    assert counts(m.default_hstate) == (0, 0, 0, 0)
    m.validate()


def test_a_gigantic_page_can_be_made_small_ones() -> None:
    m = machine("kernel", 1 << 30)
    big, small = m.hstates
    set_pool(m, 1, 1, 1 << 20)
    assert counts(big) == (1, 1, 0, 0)
    first = next(iter(big.free[1]))
    m.write(NODE_POOL % (1, 1 << 20, "demote"), "3")
    assert counts(big) == (0, 0, 0, 0)
    assert counts(small) == (512, 512, 0, 0)
    assert list(small.free[1]) == list(range(first, first + (1 << 18), 512))
    assert (big.max_huge_pages, small.max_huge_pages) == (0, 512)
    m.validate()
    set_pool(m, 0, 1)
    m.nodes[1].zone(2).drain()
    assert m.nodes[1].zone(2).nr_free()[10] == 256
    m.validate()
