"""Huge pages in scenarios: pools of a size, and programs that map, touch and free their pages."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from kmm.errors import KernelError, kernel_error
from kmm.hugetlb import PMD_ORDER, HState
from kmm.hugetlbfs import HugetlbUser, find_hstate
from kmm.mempolicy import MemPolicy
from kmm.params import PAGE_SHIFT
from kmm.sysfs_hugetlb import nr_hugepages_store, nr_overcommit_hugepages_store
from kmm.wording import counted

if TYPE_CHECKING:
    from kmm.machine import Machine

#: What a program gets SIGBUS, or its map call an error, for.
_NONE_LEFT = (errno.ENOSPC, errno.ENOMEM)


def pool_of(m: Machine, step: Mapping[str, Any]) -> HState:
    """Return the pool that a step's ``page_size`` names, that of 2 MiB if there is none.

    :raises InvalidArgument: if the machine has no such pool.
    """
    return find_hstate(m, step.get("page_size", 1 << (PMD_ORDER + PAGE_SHIFT)))


def set_pool(m: Machine, step: Mapping[str, Any], nodes: list[int]) -> str:
    """Set a pool's limit of surplus pages, and its size, or that of its part on each node.

    As in the kernel a pool gets as much as there is; what it has then is told.

    :param nodes: the kernel's numbers; none for the whole pool.
    :raises NoSuchFile: if a node is not there, which has no file for it then; nothing is done.
    """
    h = pool_of(m, step)
    for nid in nodes:
        if nid not in m.node_devices:
            there = ", ".join(map(str, sorted(m.node_devices)))
            raise kernel_error(-errno.ENOENT, f"nodes: {nid}; allowed: {there}")
    if "overcommit" in step:
        nr_overcommit_hugepages_store(m, h, step["overcommit"])
    if "count" in step:
        for nid in nodes:
            nr_hugepages_store(m, h, step["count"], nid)
        if not nodes:
            nr_hugepages_store(m, h, step["count"])
    each = ", ".join(f"{n} on node {nid}" for nid, n in h.nr_huge_pages_node.items() if n)
    free, surplus = h.free_huge_pages, h.surplus_huge_pages
    return (
        f"{h.name}: {counted(h.nr_huge_pages, 'page')} ({each or 'none'}), {free} free, "
        f"{h.resv_huge_pages} reserved, {surplus} surplus"
    )


def new_user(
    m: Machine, name: str, step: Mapping[str, Any], pages: int, policy: MemPolicy
) -> HugetlbUser:
    """Map huge pages, none of which is touched yet.

    :param pages: huge ones.
    :raises OutOfMemory: if they cannot be reserved.
    """
    return HugetlbUser(
        m,
        name,
        pages,
        size=pool_of(m, step).size,
        policy=policy,
        cpu=step.get("cpu"),
        reserve=step.get("reserve", True),
        tokens=step.get("tokens", False),
    )


def touch_huge(user: HugetlbUser, slots: Iterable[int]) -> tuple[int, str]:
    """Touch huge pages in an order, until there is none for one that is absent.

    :return: how many were touched, and why the rest was not: nothing if all were.
    """
    done = 0
    for index in slots:
        try:
            user.fault(int(index), 1)
        except KernelError as e:
            if e.errno not in _NONE_LEFT:
                raise
            return done, f": {e}"
        done += 1
    return done, ""
