"""Policies: which nodes give, and what becomes of policies whose nodes lose their memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmm import KernelError, Machine, MachineConfig
from kmm._mempolicy import touch_in_turn
from kmm.cpuset import CpuSet, update_nodemask
from kmm.memory import User
from kmm.mempolicy import MemPolicy, mpol_rebind_policy, new_policy, place, touch_interleaved
from kmm.params import SLOT_YOUNG, USER_ANON, USER_SHMEM, ZONE_MOVABLE, ZONE_NORMAL
from kmm.snapshot import differences, dump
from kmm.vmstat import all_vm_events, zone_numa_events
from tests.conftest import with_nobody_to_kill
from tests.reference.mempolicy_twin import Policy

CONFIG: dict[str, Any] = {
    "memory": "512M",
    "maxmem": "8G",
    "cpus": 3,
    "nodes": [
        {"cpus": "0-1", "memory": "256M"},
        {"cpus": "2", "memory": "128M"},
        {"memory": "128M"},
        {},
    ],
    "distances": [[10, 20, 40, 30], [20, 10, 30, 40], [40, 30, 10, 20], [30, 40, 20, 10]],
    "cmdline": "memhp_default_state=online_movable",
    "srat": "full",
}
DIMM = 0x100000000
STATE = "/sys/devices/system/memory/memory{}/state"


def machine() -> Machine:
    """Four nodes, the last of which has two blocks of movable memory only."""
    m = Machine(MachineConfig.from_dict(CONFIG))
    m.plug("a", 3, DIMM, 256 << 20)
    return with_nobody_to_kill(m)


def nodes_of(m: Machine, user: User) -> list[int]:
    zones = [m.page_zone(int(pfn)) for pfn in user.pfns()]
    return [zone.nid for zone in zones if zone is not None]


def counts(m: Machine) -> dict[str, int]:
    events = [zone_numa_events(zone) for zone in m.all_zones()]
    return {k: sum(e[k] for e in events) for k in events[0]}


NODES = st.sets(st.integers(0, 3), min_size=1)


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(["default", "bind", "preferred", "interleave"]),
    nodes=NODES,
    flag=st.sampled_from(["", "static", "relative"]),
    kind=st.sampled_from(["anon", "shmem", "file"]),
    cpu=st.integers(0, 2),
    mems=st.none() | NODES,
    later=NODES,
    first=st.integers(0, 60),
)
def test_pages_come_from_the_nodes_that_the_twin_says(
    mode: str,
    nodes: set[int],
    flag: str,
    kind: str,
    cpu: int,
    mems: set[int] | None,
    later: set[int],
    first: int,
) -> None:
    m = machine()
    if mode == "default":
        nodes, flag = set(), ""
    group = CpuSet(m, "group", mems) if mems is not None else None
    have = set(mems) if mems is not None else {0, 1, 2, 3}
    twin = Policy(mode, sorted(nodes), flag, have)
    if nodes and not twin.nodes:
        with pytest.raises(KernelError, match="nodes"):
            new_policy(m, mode, nodes, flag, have)
        return
    user = User(m, "u", kind, 120, policy=new_policy(m, mode, nodes, flag, have), cpu=cpu)
    if group is not None:
        group.attach(user)
    fallback = {nid: m.nodes[nid].fallback_order for nid in m.nodes}
    by_index, here = kind in ("anon", "shmem"), m.node_of_cpu(cpu)
    before = counts(m)
    want = []
    for start, n in ((first, 20), (0, first), (80, 40)):
        if start == 80 and group is not None:
            update_nodemask(group, later)
            have = set(later)
            if kind == "anon":
                twin.rebind(have)
        user.fault(start, n)
        want += [
            (i, twin.node_for(i, by_index, here, fallback, have)) for i in range(start, start + n)
        ]
    assert nodes_of(m, user) == [nid for _, nid in sorted(want)]
    after = counts(m)
    assert after["numa_hit"] + after["numa_miss"] - before["numa_hit"] - before["numa_miss"] == len(
        want
    )
    local = sum(nid == here for _, nid in want)
    assert after["numa_local"] - before["numa_local"] == local
    m.validate()


@settings(max_examples=200, deadline=None)
@given(
    nodes=NODES,
    flag=st.sampled_from(["", "static", "relative"]),
    old=NODES,
    steps=st.lists(st.sets(st.integers(0, 3)), max_size=4),
)
def test_moving_over_is_as_the_twin_does(
    nodes: set[int], flag: str, old: set[int], steps: list[set[int]]
) -> None:
    twin = Policy("bind", sorted(nodes), flag, old)
    policy = MemPolicy(
        "bind",
        tuple(sorted(twin.nodes)),
        flag,
        tuple(sorted(nodes)) if flag else (),
        tuple(sorted(old)),
    )
    for mems in steps:
        twin.rebind(mems)
        policy = mpol_rebind_policy(policy, mems)
        assert set(policy.nodes) == twin.nodes


def test_interleaved_pages_are_counted_where_their_turn_was_kept() -> None:
    m = machine()
    user = User(m, "u", "shmem", 100, policy=new_policy(m, "interleave", [1, 3]))
    before = counts(m)["numa_interleave"]
    user.fault(0, 100)
    assert nodes_of(m, user) == [1, 3] * 50
    assert counts(m)["numa_interleave"] - before == 100
    assert zone_numa_events(m.nodes[3].zone(ZONE_MOVABLE))["numa_interleave"] == 50
    m.validate()


def test_a_task_counts_on_where_a_range_goes_by_its_offset() -> None:
    m = machine()
    policy = new_policy(m, "interleave", [0, 1])
    for kind, want in (("file", [0, 1, 0]), ("anon", [0, 0, 0])):
        user = User(m, kind, kind, 9, policy=policy)
        for index in (0, 2, 4):
            user.fault(index, 1)
        there = [m.page_zone(int(pfn)) for pfn in user.pfns() if pfn >= 0]
        assert [zone.nid for zone in there if zone is not None] == want
    m.validate()


def test_huge_pages_take_turns_too() -> None:
    m = machine()
    user = User(m, "u", "anon", 4 * 512, policy=new_policy(m, "interleave", [0, 3]), thp="always")
    user.fault(0, 4 * 512)
    assert nodes_of(m, user)[::512] == [0, 3, 0, 3]
    assert m.memmap_engine.is_allocated(int(user.pfns()[0]), 9)
    m.validate()


def test_a_huge_page_elsewhere_is_only_taken_by_who_asked_for_one() -> None:
    m = machine()
    # Node 1 has free pages, but no free block of order 9.
    filler = m.alloc_pages_bulk(1 << 20, 9, 0x300CCA, nid=1)  # __GFP_THISNODE
    for pfn in filler[:10]:
        m.split_page(int(pfn), 9)
        m.free_pages_bulk([int(pfn) + i for i in range(0, 512, 2)])
    small = User(m, "always", "anon", 512, cpu=2, thp="always")
    small.fault(0, 512)
    assert set(nodes_of(m, small)) == {1}
    wanted = User(m, "madvise", "anon", 512, cpu=2, thp="madvise")
    wanted.fault(0, 512)
    assert set(nodes_of(m, wanted)) == {0}
    assert m.memmap_engine.is_allocated(int(wanted.pfns()[0]), 9)
    events = all_vm_events(m)
    assert (events["thp_fault_alloc"], events["thp_fault_fallback"]) == (1, 1)
    m.free_pages_bulk(filler[10:], 9)
    m.validate()


def test_bound_nodes_give_in_the_order_of_the_zonelist_until_they_are_full() -> None:
    m = machine()
    room = {nid: sum(z.nr_free_pages for z in m.nodes[nid].zones) for nid in (1, 2, 3)}
    user = User(m, "u", "anon", 1 << 20, policy=new_policy(m, "bind", [1, 2, 3]))
    with pytest.raises(KernelError):
        user.fault(0, 1 << 20)
    nodes = nodes_of(m, user)
    assert m.nodes[0].fallback_order == [0, 1, 3, 2]
    # Each is left at its low mark first; what lies below comes in a second round.
    assert nodes[: room[1] // 2] == [1] * (room[1] // 2)
    assert list(dict.fromkeys(nodes)) == [1, 3, 2]
    assert all(nodes.count(nid) > 0.9 * room[nid] for nid in (1, 2, 3))
    m.validate()


def test_the_kernel_heeds_no_binding_to_movable_memory() -> None:
    m = machine()
    policy = new_policy(m, "bind", [3])
    assert place(m, policy, 0, 0, zone_idx=ZONE_NORMAL).nodemask is None
    assert place(m, policy, 0, 0).nodemask == (3,)
    slab = User(m, "slab", "slab", 10, policy=policy)
    slab.fault(0, 10)
    assert set(nodes_of(m, slab)) == {0}
    m.validate()


def test_a_policy_whose_nodes_lost_their_memory_is_passed_over_and_holds_again_later() -> None:
    m = machine()
    for mode in ("bind", "preferred", "interleave"):
        policy = new_policy(m, mode, [3])
        for block in (32, 33):
            m.write(STATE.format(block), "offline")
        user = User(m, mode, "shmem", 10, policy=policy, cpu=2)
        user.fault(0, 5)
        # Bound pages are taken from near the task, others from near the node.
        assert set(nodes_of(m, user)) == {1 if mode == "bind" else 2}
        for block in (32, 33):
            m.write(STATE.format(block), "online_movable")
        user.fault(5, 5)
        assert nodes_of(m, user)[5:] == [3] * 5
        m.validate()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("prefer", [1]), "mode: 'prefer'; allowed: default, bind, preferred, interleave"),
        (("default", [1]), r"nodes: \[1\]; allowed: none with mode 'default'"),
        (("bind", []), r"nodes: \[\]; allowed: some of those with memory: \[0, 1, 2, 3\]"),
        (("bind", [4]), "nodes: 4; allowed: "),
        (("bind", [1], "fixed"), "flag: 'fixed'; allowed: "),
        (("preferred", [], "static"), "flag: 'static'; allowed: "),
    ],
)
def test_bad_policies_are_named(args: tuple[Any, ...], message: str) -> None:
    m = machine()
    with pytest.raises(KernelError, match=message):
        new_policy(m, *args)
    assert new_policy(m, "preferred") == MemPolicy("preferred")
    m.validate()


def test_kinds_that_interleave_by_index() -> None:
    m = machine()
    policy = new_policy(m, "interleave", [0, 1, 2])
    for kind in ("anon", "shmem"):
        user = User(m, kind, kind, 6, policy=policy)
        user.interleave_offset = 2
        user.fault(0, 6)
        assert nodes_of(m, user) == [2, 0, 1, 2, 0, 1]
        assert user.kind in (USER_ANON, USER_SHMEM)
    m.validate()


def test_touching_at_random_gives_each_page_to_its_turn_at_once() -> None:
    """Many slots in one go come to what one after the other does, and what is there is young."""
    order = np.random.default_rng(3).permutation(2000).astype(np.int64)
    for kind in ("anon", "shmem", "file"):
        machines = machine(), machine()
        users = [
            User(m, "u", kind, 2000, policy=new_policy(m, "interleave", [0, 1, 3]))
            for m in machines
        ]
        for user in users:
            user.interleave_offset = 2
            user.fault(100, 50)
        assert touch_interleaved(users[0], order) == 2000
        for at in order:
            assert touch_interleaved(users[1], np.array([at])) == 1
        assert not differences(dump(machines[0]), dump(machines[1]))
        assert (users[0].engine.slots[100:150] & np.uint64(SLOT_YOUNG) != 0).all()
        if kind == "anon":
            want = [[0, 1, 3][(at + 2) % 3] for at in range(2000)]
            assert nodes_of(machines[0], users[0]) == want
        machines[0].validate()


def test_what_touches_in_turn_is_checked() -> None:
    m = machine()
    user = User(m, "u", "anon", 10, policy=new_policy(m, "interleave", [0, 1]))
    hits = np.zeros(len(m.all_zones()), dtype=np.int64)

    def touch(slots: list[int], nodes: list[int], first: int) -> None:
        at, circle = np.array(slots, dtype=np.int64), np.array(nodes, dtype=np.int64)
        touch_in_turn(user.engine, m, at, user.gfp, circle, first, True, 3, 0, hits)

    with pytest.raises(ValueError, match="in_turn: first 2 of 2 nodes"):
        touch([0], [0, 1], 2)
    with pytest.raises(ValueError, match="in_turn: node 64"):
        touch([0], [0, 64], 0)
    with pytest.raises(ValueError, match="allowed: 0 to 10"):
        touch([3, 10], [0, 1], 0)
    assert user.nr_present == 0
    touch([3], [0, 1], 0)
    assert nodes_of(m, user) == [1]
    m.validate()
