"""Loads: what the programs of a scenario or a recording do to memory, as a step's ``load`` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kmm.errors import KernelError, OutOfMemory, check_number
from kmm.hugetlb import ULONG_MAX
from kmm.hugetlbfs import HugetlbUser, find_hstate
from kmm.memory import User
from kmm.mempolicy import DEFAULT_POLICY, MemPolicy, new_policy
from kmm.params import NR_PAGES_MAX
from kmm.sysfs_hugetlb import nr_hugepages_store

if TYPE_CHECKING:
    from kmm.machine import Machine


def play_loads(m: Machine, load: Any) -> str:
    """Do what a step's ``load`` says: one object, or a list of them, in order.

    :return: what came of it, in words.
    :raises KernelError: for nodes or a policy that the machine does not take.
    """
    loads = load if isinstance(load, list) else [load]
    return "; ".join(_play(m, one) for one in loads)


def _policy(m: Machine, load: Mapping[str, Any]) -> MemPolicy:
    nodes = [m.pxm_to_node.get(pxm, pxm) for pxm in load.get("nodes", [])]
    mode = load.get("policy", "bind" if nodes else "default")
    if mode == "default":
        return DEFAULT_POLICY
    return new_policy(m, mode, nodes)


def _play(m: Machine, load: Mapping[str, Any]) -> str:
    kind = load["kind"]
    if load.get("free"):
        return _free(m, load)
    if kind in ("anon", "shmem", "file"):
        return _touch(m, load, kind)
    if kind == "hugetlb":
        return _hugetlb_pool(m, load)
    if kind == "hugetlb_user":
        return _touch_huge_pages(m, load)
    if kind == "exit":
        name = str(load.get("user"))
        if name in m.users:
            m.users[name].close()
        return f"{name}: gone"
    return f"{kind}: not played"


def _hugetlb_pool(m: Machine, load: Mapping[str, Any]) -> str:
    """Set the size of a pool, or of its part on some nodes."""
    h = find_hstate(m, load.get("size", m.default_hstate.size))
    count = check_number("load.count", load.get("count"), 0, ULONG_MAX)
    nodes = [m.pxm_to_node.get(pxm, pxm) for pxm in load.get("nodes", [])]
    for nid in nodes or [None]:
        nr_hugepages_store(m, h, count, nid)
    return f"{h.name}: {h.nr_huge_pages} pages"


def _touch_huge_pages(m: Machine, load: Mapping[str, Any]) -> str:
    """Let a program map huge pages and touch some, first to last."""
    name = str(load.get("user", "hugetlb"))
    count = check_number("load.count", load.get("count"), 0, NR_PAGES_MAX)
    touch = check_number("load.touch", load.get("touch", count), 0, count)
    user = m.users.get(name)
    try:
        if user is None:
            size, policy = load.get("size"), _policy(m, load)
            user = HugetlbUser(m, name, count, size=size, policy=policy, tokens=True)
        user.fault(0, touch)
    except KernelError as e:
        return f"{name}: {e}"
    return f"{name}: {user.nr_present} of {user.pages} huge pages"


def _touch(m: Machine, load: Mapping[str, Any], kind: str) -> str:
    """Let a program write so many pages, first to last."""
    name = str(load.get("user") or load.get("file") or kind)
    pages = load["pages"]
    user = m.users.get(name)
    if user is None:
        thp = "madvise" if load.get("thp") else "never"
        user = User(m, name, kind, pages, policy=_policy(m, load), tokens=True, thp=thp)
        start = 0
    else:
        start = user.pages
        user.engine.resize(start + pages)
    try:
        user.fault(start, pages)
    except OutOfMemory as e:
        return f"{name}: {user.nr_present} of {user.pages} pages: {e}"
    return f"{name}: {user.nr_present} pages"


def _free(m: Machine, load: Mapping[str, Any]) -> str:
    """Delete a file, or end a program: all that it had goes."""
    name = str(load.get("user") or load.get("file"))
    if name not in m.users:
        return f"{name}: not there"
    freed = m.users[name].nr_present
    m.users[name].close()
    return f"{name}: {freed} pages freed"
