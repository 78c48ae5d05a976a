"""Which nodes give memory to whom (mm/mempolicy.c).

A policy belongs to a range of an address space, to a tmpfs mount or to a task; here each user of
pages has one.  It names nodes, of which its cpuset may forbid some, and which may lose their
memory: then the policy is moved over to other nodes, or passed over, as the kernel does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kmm import _mempolicy
from kmm.errors import check_number, check_numbers, kernel_error, shown
from kmm.params import USER_ANON, USER_SHMEM, ZONE_MOVABLE

if TYPE_CHECKING:
    from kmm.machine import Machine
    from kmm.memory import User

MODES = ("default", "bind", "preferred", "interleave")
#: What happens to a policy's nodes when those that its task may use change: they are mapped over
#: to the new ones by their rank, stay what the user said, or are counted from the first allowed.
FLAGS = ("", "static", "relative")
ALL_NODES = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class MemPolicy:
    """A NUMA policy: its mode, one of MODES, and its nodes in ascending order.

    ``flag`` is one of FLAGS; ``user_nodes`` what the user said, for those with a flag;
    ``mems_allowed`` what its task might use when the nodes were last looked at.
    """

    mode: str = "default"
    nodes: tuple[int, ...] = ()
    flag: str = ""
    user_nodes: tuple[int, ...] = ()
    mems_allowed: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request goes: whose zonelist is used, and which nodes may give (None for all)."""

    nid: int
    nodemask: tuple[int, ...] | None = None


DEFAULT_POLICY = MemPolicy()


def new_policy(
    m: Machine,
    mode: str,
    nodes: Collection[int] = (),
    flag: str = "",
    mems: Collection[int] | None = None,
) -> MemPolicy:
    """Make a policy, checked as set_mempolicy and mbind check it (mpol_new).

    :param mode: one of MODES; nodes: what it is about, none for ``default``.
    :param flag: one of FLAGS; mems: nodes that its task may use, None for all with memory.
    :raises InvalidArgument: for another mode or flag, a node that there is not, no usable node
        where some are needed, or some where none is.
    """
    if mode not in MODES:
        raise kernel_error(-22, f"mode: {shown(mode)}; allowed: {', '.join(MODES)}")
    wanted = sorted(check_numbers("nodes", nodes, 0, len(m.nodes) - 1))
    if flag not in FLAGS or (flag and not wanted):
        have = shown(flag)
        raise kernel_error(-22, f"flag: {have}; allowed: '', or with nodes 'static', 'relative'")
    if mode == "default":
        if wanted:
            raise kernel_error(-22, f"nodes: {wanted}; allowed: none with mode 'default'")
        return DEFAULT_POLICY
    if mode == "preferred" and not wanted:
        return MemPolicy(mode)
    if mems is not None:
        mems = check_numbers("mems", mems, 0, len(m.nodes) - 1)
    current = tuple(sorted(m.top_cpuset_mems if mems is None else mems))
    allowed = [nid for nid in current if nid in m.n_memory]
    usable = (
        mpol_relative_nodemask(wanted, allowed)
        if flag == "relative"
        else tuple(nid for nid in wanted if nid in allowed)
    )
    if not usable:
        raise kernel_error(-22, f"nodes: {wanted}; allowed: some of those with memory: {allowed}")
    nodes_of_mode = usable[:1] if mode == "preferred" else usable
    return MemPolicy(mode, nodes_of_mode, flag, tuple(wanted) if flag else (), current)


def check_policy(m: Machine, policy: object) -> MemPolicy:
    """Return an argument that has to be a policy which a machine can follow.

    :raises InvalidArgument: naming its value and what is allowed.
    """
    if not isinstance(policy, MemPolicy) or policy.mode not in MODES or policy.flag not in FLAGS:
        raise kernel_error(-22, f"policy: {shown(policy)}; allowed: what new_policy makes")
    numbers = (*policy.nodes, *policy.user_nodes, *policy.mems_allowed)
    for nid in numbers:
        check_number("policy.nodes", nid, 0, len(m.nodes) - 1)
    if policy.mode in ("bind", "interleave") and not policy.nodes:
        raise kernel_error(-22, f"policy.nodes: (); allowed: some, with mode {policy.mode!r}")
    return policy


def mpol_relative_nodemask(nodes: Collection[int], allowed: Collection[int]) -> tuple[int, ...]:
    """Return the allowed nodes whose ranks are named; ranks beyond the last begin anew."""
    ranked = sorted(allowed)
    if not ranked:
        return ()
    return tuple(sorted({ranked[nid % len(ranked)] for nid in nodes}))


def _nodes_remap(nodes: Iterable[int], old: Collection[int], new: Collection[int]) -> set[int]:
    """Map nodes from one set into another by their rank; those outside the old set stay."""
    ranks = {nid: rank for rank, nid in enumerate(sorted(old))}
    to = sorted(new)
    return {to[ranks[nid] % len(to)] if to and nid in ranks else nid for nid in nodes}


def mpol_rebind_policy(policy: MemPolicy, mems: Collection[int]) -> MemPolicy:
    """Return what a policy becomes when its task may use other nodes.

    :param mems: the nodes that it may use from now on.
    """
    new = tuple(sorted(mems))
    if policy.mode == "default" or not policy.nodes:
        return policy
    if not policy.flag and policy.mems_allowed == new:
        return policy
    if policy.mode == "preferred":
        # The kernel leaves the preferred node as it is; without memory its neighbours give.
        return replace(policy, mems_allowed=new)
    if policy.flag == "static":
        nodes = set(policy.user_nodes) & set(new)
    elif policy.flag == "relative":
        nodes = set(mpol_relative_nodemask(policy.user_nodes, new))
    else:
        nodes = _nodes_remap(policy.nodes, policy.mems_allowed, new)
    return replace(policy, nodes=tuple(sorted(nodes or set(new))), mems_allowed=new)


def apply_policy_zone(m: Machine, policy: MemPolicy, zone_idx: int) -> bool:
    """Whether a bind policy speaks for requests that may use zones up to an index.

    Nodes that have nothing but Movable memory cannot serve what may not move.
    """
    lowest = m.policy_zone
    if not set(policy.nodes) & m.n_normal_memory:
        lowest = ZONE_MOVABLE
    return zone_idx >= lowest


def policy_nodemask(
    m: Machine, policy: MemPolicy, zone_idx: int, mems: Collection[int]
) -> tuple[int, ...] | None:
    """Return which nodes a policy lets give, None for all."""
    if (
        policy.mode == "bind"
        and apply_policy_zone(m, policy, zone_idx)
        and not set(policy.nodes).isdisjoint(mems)
    ):
        return policy.nodes
    return None


def offset_il_node(policy: MemPolicy, offset: int, here: int) -> int:
    """Return the node whose turn it is at an offset of a range; ``here`` if there are none."""
    return policy.nodes[offset % len(policy.nodes)] if policy.nodes else here


def interleave_nodes(policy: MemPolicy, prev: int) -> int:
    """Return the node behind one in a policy's circle."""
    return next((nid for nid in policy.nodes if nid > prev), policy.nodes[0])


def place(
    m: Machine,
    policy: MemPolicy,
    cpu: int,
    index: int,
    mems: Collection[int] | None = None,
    zone_idx: int = ZONE_MOVABLE,
) -> Placement:
    """Return where a page of a user goes (policy_node, policy_nodemask, interleave_nid).

    :param cpu: which CPU touches it; index: of the page at its user, which interleaving counts.
    :param mems: nodes that the task's cpuset lets it use, None for all that have memory.
    :param zone_idx: the highest zone that the request may use.
    """
    here = m.node_of_cpu(cpu)
    allowed = m.top_cpuset_mems if mems is None else mems
    mask = policy_nodemask(m, policy, zone_idx, allowed)
    if mems is not None:
        # The zones of a policy's nodes that the cpuset forbids are passed over.
        mask = tuple(sorted(set(mems).intersection(mask) if mask is not None else mems))
    if policy.mode == "preferred" and policy.nodes:
        return Placement(policy.nodes[0], mask)
    if policy.mode == "interleave":
        return Placement(offset_il_node(policy, index, here), mask)
    return Placement(here, mask)


def mask_of(where: Placement) -> int:
    """Return the nodes that may give as bits."""
    if where.nodemask is None:
        return ALL_NODES
    return sum(1 << nid for nid in where.nodemask)


def fault_interleaved(user: User, at: int, n: int, flags: int) -> int:
    """Touch pages whose nodes take turns, until a request cannot be served at once.

    In ranges of address spaces and tmpfs files the index tells whose turn it is; what the task
    itself asks for (page cache, the kernel's own) is counted on from its last one.

    :param at: first index; n: pages; flags: PG_* marks of new pages.
    :return: how many were passed.
    """
    turns = _Turns(user, at)
    done, turn = _mempolicy.fault_in_turn(
        user.engine, user.m, at, n, *turns.request(at), flags, turns.hits
    )
    turns.count(turn)
    return int(done)


def touch_interleaved(user: User, slots: npt.NDArray[np.int64]) -> int:
    """Touch slots in an order, likewise; those that have a page become young.

    :param slots: their numbers.
    :return: how many were passed.
    """
    turns = _Turns(user, 0)
    done, turn = _mempolicy.touch_in_turn(
        user.engine, user.m, slots, *turns.request(int(slots[0])), turns.hits
    )
    turns.count(turn)
    return int(done)


class _Turns:
    """Whose turn it is among a user's nodes, and what was served by whose turn it was."""

    def __init__(self, user: User, at: int) -> None:
        self.user = user
        nodes = user.policy.nodes
        self.by_index = user.kind in (USER_ANON, USER_SHMEM)
        if self.by_index:
            self.first = (at + user.interleave_offset) % len(nodes)
        else:
            self.first = nodes.index(interleave_nodes(user.policy, user.il_prev))
        self.nodes = np.array(nodes, dtype=np.int64)
        self.hits = np.zeros(len(user.m.all_zones()), dtype=np.int64)

    def request(self, at: int) -> tuple[int, npt.NDArray[np.int64], int, bool, int, int]:
        """Return what the engine is asked with: gfp, nodes, whose turn, who may serve, CPU."""
        user = self.user
        mask = mask_of(place(user.m, user.policy, user.cpu, at, user.mems))
        return user.gfp, self.nodes, self.first, self.by_index, mask, user.cpu

    def count(self, turn: int) -> None:
        """Note how far the circle went, and the hits at their zones."""
        nodes = self.user.policy.nodes
        if not self.by_index:
            self.user.il_prev = nodes[(turn - 1) % len(nodes)]
        for index in np.flatnonzero(self.hits).tolist():
            stat = self.user.m.all_zones()[index].vmstat
            stat["numa_interleave"] = stat.get("numa_interleave", 0) + int(self.hits[index])
