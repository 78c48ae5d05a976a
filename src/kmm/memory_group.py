"""Memory groups: which blocks one device added (drivers/base/memory.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kmm.errors import kernel_error
from kmm.mmzone import MemoryGroup
from kmm.trace import fallible, traced
from kmm.wording import counted

if TYPE_CHECKING:
    from kmm.machine import Machine


def _register(m: Machine, group: MemoryGroup) -> int:
    if group.nid not in m.nodes:
        raise kernel_error(-22, f"node {group.nid} is not possible")
    group.mgid = next(i for i in range(len(m.memory_groups) + 1) if i not in m.memory_groups)
    m.memory_groups[group.mgid] = group
    return group.mgid


@fallible
def memory_group_register_static(m: Machine, nid: int, max_pages: int) -> int:
    """Register a group whose memory comes and goes as one.

    :param nid: node; max_pages: pages of the whole device.
    :return: the group's id.
    :raises InvalidArgument: for an impossible node or no pages.
    """
    if not max_pages:
        raise kernel_error(-22, "memory group without pages")
    return _register(m, MemoryGroup(0, nid, False, max_pages=max_pages))


@fallible
def memory_group_register_dynamic(m: Machine, nid: int, unit_pages: int) -> int:
    """Register a group that grows and shrinks by units.

    :param nid: node; unit_pages: a power of two of at least one memory block, pages.
    :return: the group's id.
    :raises InvalidArgument: for an impossible node or a unit that is not allowed.
    """
    if unit_pages & (unit_pages - 1) or unit_pages < m.block_pages:
        raise kernel_error(-22, f"unit of {counted(unit_pages, 'page')}")
    return _register(m, MemoryGroup(0, nid, True, unit_pages=unit_pages))


@traced
def memory_group_unregister(m: Machine, mgid: int) -> None:
    """Remove a group.

    :raises InvalidArgument: if there is none with this id; Busy: if blocks belong to it.
    """
    group = m.memory_groups.get(mgid)
    if group is None:
        raise kernel_error(-22, f"no memory group {mgid}")
    if group.blocks:
        raise kernel_error(-16, f"memory group {mgid} has blocks")
    del m.memory_groups[mgid]
