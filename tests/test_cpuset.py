"""Groups of tasks: which nodes they may use, as memory comes and goes."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from kmm import KernelError, Machine
from kmm.cpuset import CpuSet, update_nodemask
from kmm.memory import User
from kmm.mempolicy import new_policy
from tests.conftest import DIMM, two_nodes, with_nobody_to_kill

STATE = "/sys/devices/system/memory/memory{}/state"


def machine() -> Machine:
    m = two_nodes("memhp_default_state=online_movable")
    m.plug("a", 1, DIMM, 256 << 20)
    return with_nobody_to_kill(m)


def nodes_of(m: Machine, user: User) -> list[int]:
    zones = [m.page_zone(int(pfn)) for pfn in user.pfns() if pfn >= 0]
    return [zone.nid for zone in zones if zone is not None]


def test_a_task_gets_pages_of_its_groups_nodes_only() -> None:
    m = machine()
    group = CpuSet(m, "group", [1])
    user = User(m, "u", "anon", 1 << 17)
    group.attach(user)
    with pytest.raises(KernelError) as e:
        user.fault(0, 1 << 17)
    assert e.value.errno == errno.ENOMEM
    assert set(nodes_of(m, user)) == {1}
    assert user.nr_present > 60000
    m.validate()


def test_the_kernel_for_itself_looks_beyond_the_group_before_it_has_nothing() -> None:
    m = machine()
    group = CpuSet(m, "group", [1])
    slab = User(m, "slab", "slab", 100)
    group.attach(slab)
    slab.fault(0, 100)
    assert set(nodes_of(m, slab)) == {0}  # node 1 has nothing but movable memory
    m.validate()


def test_groups_follow_the_nodes_that_have_memory() -> None:
    m = machine()
    parent = CpuSet(m, "parent", [0, 1])
    child = CpuSet(m, "child", [1], parent)
    rest = CpuSet(m, "rest")
    assert (parent.effective_mems, child.effective_mems, rest.effective_mems) == (
        {0, 1},
        {1},
        {0, 1},
    )
    user = User(m, "u", "anon", 100)
    child.attach(user)
    user.fault(0, 10)
    assert set(nodes_of(m, user)) == {1}
    for block in (32, 33):
        m.write(STATE.format(block), "offline")
    # What it asks for is not there: it has what its parent has.
    assert (parent.effective_mems, child.effective_mems, rest.effective_mems) == ({0}, {0}, {0})
    m.validate()
    user.fault(10, 10)
    assert set(nodes_of(m, user)) == {0}
    m.write(STATE.format(32), "online_movable")
    assert (parent.effective_mems, child.effective_mems, rest.effective_mems) == (
        {0, 1},
        {1},
        {0, 1},
    )
    user.fault(20, 10)
    assert nodes_of(m, user)[20:] == [1] * 10
    m.validate()


def test_other_nodes_move_the_policies_of_address_spaces_over_but_not_those_of_files() -> None:
    m = machine()
    group = CpuSet(m, "group", [0])
    policy = new_policy(m, "bind", [0], mems=[0])
    space = User(m, "space", "anon", 20, policy=policy)
    file = User(m, "file", "shmem", 20, policy=policy)
    for user in (space, file):
        group.attach(user)
        user.fault(0, 10)
    update_nodemask(group, [1])
    assert (space.policy.nodes, file.policy.nodes) == ((1,), (0,))
    for user in (space, file):
        user.fault(10, 10)
        assert nodes_of(m, user) == [0] * 10 + [1] * 10
    m.validate()


def test_bad_groups_are_named_and_change_nothing() -> None:
    m = machine()
    group = CpuSet(m, "group", [0])
    other = CpuSet(machine(), "other")
    for args, message in [
        (("group",), "name: 'group'; allowed: "),
        (("",), "name: ''; allowed: "),
        (("new", [7]), "mems: 7; allowed: "),
        (("new", [0], other), "parent: <cpuset other"),
    ]:
        with pytest.raises(KernelError, match=message):
            CpuSet(m, *args)  # type: ignore[arg-type]
    with pytest.raises(KernelError, match="mems: 9; allowed: "):
        update_nodemask(group, [9])
    assert (list(m.cpusets), group.effective_mems) == (["group"], {0})
    m.validate()


def test_a_group_goes_when_it_is_empty() -> None:
    m = machine()
    group = CpuSet(m, "group", [1])
    child = CpuSet(m, "child", [], group)
    user = User(m, "u", "anon", 1)
    child.attach(user)
    with pytest.raises(KernelError, match="cpuset 'group' has 'child'"):
        group.close()
    with pytest.raises(KernelError, match="cpuset 'child' has 'u'"):
        child.close()
    user.close()
    child.close()
    group.close()
    assert not m.cpusets
    m.validate()


def test_only_users_that_are_there_can_join() -> None:
    m, other = machine(), machine()
    group = CpuSet(m, "group", [1])
    closed = User(m, "closed", "anon", 10)
    closed.close()
    for user in (closed, User(other, "o", "anon", 10), None, "o", 3):
        with pytest.raises(KernelError, match=r"user: .*; allowed: a user of this machine") as e:
            group.attach(user)  # type: ignore[arg-type]
        assert e.value.errno == errno.EINVAL
    assert not group.users
    group.close()
    user = User(m, "u", "anon", 10)
    with pytest.raises(KernelError, match="cpuset 'group': is closed"):
        group.attach(user)
    assert user.cpuset is None
    m.validate()


@pytest.mark.parametrize("mems", [1, None, "0", [0.5], [7], ["a"]])
def test_what_is_no_list_of_nodes_is_refused(mems: Any) -> None:
    m = machine()
    group = CpuSet(m, "group", [1])
    for act in (
        lambda: CpuSet(m, "c", mems),
        lambda: update_nodemask(group, mems),
        lambda: new_policy(m, "bind", mems),
        lambda: new_policy(m, "bind", mems, "static"),
    ):
        with pytest.raises(KernelError, match=r"(mems|nodes): .*; allowed: a") as e:
            act()
        assert e.value.errno == errno.EINVAL
    for parent in (3, "group", CpuSet(machine(), "group")):
        with pytest.raises(KernelError, match=r"parent: .*; allowed: a cpuset of this machine"):
            CpuSet(m, "c", [0], parent)  # type: ignore[arg-type]
    assert list(m.cpusets) == ["group"]
    assert group.effective_mems == {1}
    m.validate()
