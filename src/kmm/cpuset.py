"""Which nodes the tasks of a group may use (kernel/cgroup/cpuset.c, as in the unified hierarchy).

A group asks for nodes and gets those of them that its parent has, or all of the parent's if none
is left.  Nodes that lose their memory leave every group, and come back with it; the policies of
the tasks' memory are moved over each time.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from kmm.errors import check_numbers, check_text, kernel_error, shown
from kmm.mempolicy import mpol_rebind_policy
from kmm.params import USER_ANON
from kmm.trace import traced

if TYPE_CHECKING:
    from kmm.machine import Machine
    from kmm.memory import User


class CpuSet:
    """A group of tasks; those that are in none belong to the top one, which has all nodes.

    :param name: unique on its machine; mems: nodes that it asks for, none for its parent's.
    :param parent: None for the top one.
    :raises InvalidArgument: naming the argument, its value and what is allowed.
    """

    name: str

    def __init__(
        self, m: Machine, name: str, mems: Collection[int] = (), parent: CpuSet | None = None
    ) -> None:
        check_text("name", name)
        if not name or name in m.cpusets:
            raise kernel_error(-22, f"name: {name!r}; allowed: a name that no other cpuset has")
        if parent is not None and not _is_there(m, parent):
            raise kernel_error(-22, f"parent: {shown(parent)}; allowed: a cpuset of this machine")
        self.m, self.name, self.parent = m, name, parent
        self.mems_allowed = _check_mems(m, mems)
        self.effective_mems: frozenset[int] = frozenset()
        self.users: list[User] = []
        m.cpusets[name] = self
        _update_effective(self)

    def __repr__(self) -> str:
        return f"<cpuset {self.name}: {sorted(self.effective_mems)}>"

    def attach(self, user: User) -> None:
        """Let a user's task be of this group; pages that it has stay where they are.

        :raises InvalidArgument: for what is no user of this machine (any more), or a group that
            is closed.
        """
        if not _is_there(self.m, self):
            raise kernel_error(-22, f"cpuset {self.name!r}: is closed")
        if user is None or self.m.users.get(getattr(user, "name", "")) is not user:
            raise kernel_error(-22, f"user: {shown(user)}; allowed: a user of this machine")
        detach(user)
        user.cpuset = self
        self.users.append(user)
        _rebind(user, self.effective_mems)

    def close(self) -> None:
        """Remove the group.

        :raises Busy: while it has tasks or groups below it.
        """
        below = [c.name for c in self.m.cpusets.values() if c.parent is self]
        if self.users or below:
            what = [u.name for u in self.users] + below
            raise kernel_error(-16, f"cpuset {self.name!r} has {', '.join(map(repr, what))}")
        del self.m.cpusets[self.name]


def detach(user: User) -> None:
    """Let a user's task be of the top group."""
    if user.cpuset is not None:
        user.cpuset.users.remove(user)
        user.cpuset = None


def _is_there(m: Machine, cs: CpuSet) -> bool:
    return isinstance(cs, CpuSet) and m.cpusets.get(cs.name) is cs


def _check_mems(m: Machine, mems: Collection[int]) -> frozenset[int]:
    return check_numbers("mems", mems, 0, len(m.nodes) - 1)


def _parent_mems(cs: CpuSet) -> frozenset[int]:
    return frozenset(cs.m.top_cpuset_mems) if cs.parent is None else cs.parent.effective_mems


def _update_effective(cs: CpuSet) -> bool:
    """Let a group have what it may; whether that is something else than before."""
    theirs = _parent_mems(cs)
    new = (cs.mems_allowed & theirs) or theirs
    changed = new != cs.effective_mems
    cs.effective_mems = new
    return changed


def _rebind(user: User, mems: Collection[int]) -> None:
    """Move the policy of an address space over; a file's belongs to its mount and stays."""
    if user.kind == USER_ANON:
        user.policy = mpol_rebind_policy(user.policy, mems)


def update_tasks_nodemask(cs: CpuSet) -> None:
    """Let the tasks of a group know its nodes.

    Their policies are moved over to the nodes that were asked for, not to those that there are,
    as the kernel does.
    """
    for user in cs.users:
        _rebind(user, cs.mems_allowed)


def update_nodemasks_hier(m: Machine) -> None:
    """Let every group have what its parent leaves it, from the top down."""
    for cs in list(m.cpusets.values()):  # a parent is older than its children
        if _update_effective(cs):
            update_tasks_nodemask(cs)


def update_nodemask(cs: CpuSet, mems: Collection[int]) -> None:
    """Ask for other nodes (a write to ``cpuset.mems``).

    :param mems: numbers of nodes, with or without memory; none for the parent's.
    :raises InvalidArgument: for a node that there is not.
    """
    cs.mems_allowed = _check_mems(cs.m, mems)
    update_nodemasks_hier(cs.m)


@traced
def cpuset_hotplug_workfn(m: Machine) -> None:
    """Follow the nodes that have memory: the top group has them all, the others what is left."""
    mems = set(m.n_memory)
    if mems == m.top_cpuset_mems:
        return
    m.top_cpuset_mems = mems
    update_nodemasks_hier(m)
