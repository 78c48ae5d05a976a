"""Which nodes give memory to whom (mm/mempolicy.c)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kmm.errors import check_number, kernel_error

if TYPE_CHECKING:
    from kmm.machine import Machine

MODES = ("default", "bind", "preferred", "interleave")


@dataclass(frozen=True, slots=True)
class MemPolicy:
    """A NUMA policy: its mode, one of MODES, and its nodes in ascending order."""

    mode: str = "default"
    nodes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request goes: whose zonelist is used, and which nodes may give (None for all)."""

    nid: int
    nodemask: tuple[int, ...] | None = None


DEFAULT_POLICY = MemPolicy()


def new_policy(m: Machine, mode: str, nodes: Collection[int] = ()) -> MemPolicy:
    """Make a policy, checked as set_mempolicy and mbind check it (mpol_new).

    :param mode: one of MODES; nodes: what it is about, none for ``default``.
    :raises InvalidArgument: for another mode, a node that is not online, no node where some are
        needed, or some where none is.
    """
    if mode not in MODES:
        raise kernel_error(-22, f"mode: {mode!r}; allowed: {', '.join(MODES)}")
    checked = sorted({check_number("nodes", nid, 0, len(m.nodes) - 1) for nid in nodes})
    if mode == "default":
        if checked:
            raise kernel_error(-22, f"nodes: {checked}; allowed: none with mode 'default'")
        return DEFAULT_POLICY
    usable = [nid for nid in checked if nid in m.n_memory]
    if not usable and not (mode == "preferred" and not checked):
        raise kernel_error(
            -22, f"nodes: {checked}; allowed: some of those with memory: {sorted(m.n_memory)}"
        )
    return MemPolicy(mode, tuple(usable))


def place(m: Machine, policy: MemPolicy, cpu: int, index: int) -> Placement:
    """Return where a page of a user goes (policy_node, policy_nodemask, interleave_nid).

    :param cpu: which CPU touches it; index: of the page at its user, which interleaving counts.
    """
    here = m.node_of_cpu(cpu)
    if policy.mode == "bind":
        return Placement(here, policy.nodes)
    if policy.mode == "preferred" and policy.nodes:
        return Placement(policy.nodes[0])
    if policy.mode == "interleave":
        nodes = [nid for nid in policy.nodes if nid in m.n_memory] or [here]
        return Placement(nodes[index % len(nodes)])
    return Placement(here)
