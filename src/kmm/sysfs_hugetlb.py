"""The files of the pools of huge pages (mm/hugetlb.c): /sys, /proc/sys/vm, /proc/meminfo."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from kmm.errors import kernel_error, shown
from kmm.hugetlb import ULONG_MAX, HState
from kmm.hugetlb_init import memparse
from kmm.hugetlb_pool import demote, set_max_huge_pages
from kmm.mempolicy import DEFAULT_POLICY, MemPolicy
from kmm.procfs import parse_long
from kmm.sysfs_entry import NUMBER, Entry, directory, readonly, word

if TYPE_CHECKING:
    from kmm.machine import Machine

HUGEPAGES = "/sys/kernel/mm/hugepages"
_INT_MIN, _INT_MAX = -(1 << 31), (1 << 31) - 1

_OF_ALL = {
    "free_hugepages": lambda h: h.free_huge_pages,
    "nr_hugepages": lambda h: h.nr_huge_pages,
    "nr_hugepages_mempolicy": lambda h: h.nr_huge_pages,
    "nr_overcommit_hugepages": lambda h: h.nr_overcommit_huge_pages,
    "resv_hugepages": lambda h: h.resv_huge_pages,
    "surplus_hugepages": lambda h: h.surplus_huge_pages,
}
_OF_NODE: dict[str, Callable[[HState, int], int]] = {
    "free_hugepages": lambda h, nid: len(h.free[nid]),
    "nr_hugepages": lambda h, nid: h.nr_huge_pages_node[nid],
    "surplus_hugepages": lambda h, nid: h.surplus_huge_pages_node[nid],
}


def kstrtoul_decimal(name: str, text: str) -> int:
    """Parse what a file takes: digits, with at most a plus before and a newline behind.

    :raises InvalidArgument: if it is something else; OutOfRange: for 2^64 and more.
    """
    match = re.fullmatch(r"\+?([0-9]+)\n?", text)
    if not match:
        raise kernel_error(-errno.EINVAL, f"{name}: {shown(word(text))}; allowed: a decimal number")
    digits = match[1].lstrip("0") or "0"
    if len(digits) > 20 or int(digits) > ULONG_MAX:
        raise kernel_error(-errno.ERANGE, f"{name}: {shown(word(text))}; allowed: below 2^64")
    return int(digits)


def nr_hugepages_store(
    m: Machine, h: HState, count: int, nid: int | None = None, policy: MemPolicy = DEFAULT_POLICY
) -> None:
    """Set the size of a pool, or of a node's part of it.

    :param nid: the node, None for all.
    :param policy: of the task that writes, which the nr_hugepages_mempolicy files heed: only its
        nodes take part.
    """
    if nid is not None:
        nodes = [nid]
    elif policy.mode == "default":
        nodes = sorted(m.n_memory)
    else:
        nodes = list(policy.nodes) or [m.this_node()]
    set_max_huge_pages(m, h, count, nid, nodes)


def nr_overcommit_hugepages_store(m: Machine, h: HState, count: int) -> None:
    """Set how many surplus pages a pool may have.

    :raises InvalidArgument: for a pool of gigantic pages, which has none.
    """
    if h.is_gigantic:
        raise kernel_error(-errno.EINVAL, f"{h.name}: gigantic pages are never surplus on demand")
    h.nr_overcommit_huge_pages = count


def _pool(m: Machine, size_kb: str) -> HState | None:
    return next((h for h in m.hstates if h.size >> 10 == int(size_kb)), None)


#: What a pool whose pages can be made smaller ones of has besides.
_DEMOTE = ("demote", "demote_size")


def _can_demote(m: Machine, h: HState) -> bool:
    return any(other.order < h.order for other in m.hstates)


def _demote_size_store(m: Machine, h: HState, text: str) -> None:
    if memparse(text) not in {other.size for other in m.hstates if other.order < h.order}:
        raise kernel_error(-errno.EINVAL, f"demote_size: {shown(word(text))}; allowed: 2M")


def _demote_file(m: Machine, h: HState, name: str, nid: int | None) -> Entry | None:
    if not _can_demote(m, h):
        return None
    if name == "demote":
        return Entry(0o200, None, lambda m, t: demote(m, h, kstrtoul_decimal(name, t), nid))
    # There is one smaller size, and so nothing to choose from.
    return Entry(0o644, lambda m: "2048kB\n", lambda m, t: _demote_size_store(m, h, t))


def _file(m: Machine, match: re.Match[str]) -> Entry | None:
    h, name = _pool(m, match[1]), match[2]
    if h is not None and name in _DEMOTE:
        return _demote_file(m, h, name, None)
    if h is None or name not in _OF_ALL:
        return None

    def show(m: Machine) -> str:
        return f"{_OF_ALL[name](h)}\n"

    def store(m: Machine, text: str) -> None:
        if name == "nr_overcommit_hugepages":
            if h.is_gigantic:
                nr_overcommit_hugepages_store(m, h, 0)
            nr_overcommit_hugepages_store(m, h, kstrtoul_decimal(name, text))
        else:
            nr_hugepages_store(m, h, kstrtoul_decimal(name, text))

    return Entry(0o644, show, store) if name.startswith("nr_") else readonly(show)


def _node_file(m: Machine, match: re.Match[str]) -> Entry | None:
    nid, h, name = int(match[1]), _pool(m, match[2]), match[3]
    if h is None or nid not in m.node_devices:
        return None
    if name in _DEMOTE:
        return _demote_file(m, h, name, nid)
    if name not in _OF_NODE:
        return None

    def show(m: Machine) -> str:
        return f"{_OF_NODE[name](h, nid)}\n"

    def store(m: Machine, text: str) -> None:
        nr_hugepages_store(m, h, kstrtoul_decimal(name, text), nid)

    return Entry(0o644, show, store) if name == "nr_hugepages" else readonly(show)


def _dir(m: Machine, match: re.Match[str]) -> Entry | None:
    h = _pool(m, match[1])
    return directory([*_OF_ALL, *(_DEMOTE if _can_demote(m, h) else ())]) if h else None


def _node_pools(m: Machine, match: re.Match[str]) -> Entry | None:
    return directory(h.name for h in m.hstates) if int(match[1]) in m.node_devices else None


def _node_dir(m: Machine, match: re.Match[str]) -> Entry | None:
    h = _pool(m, match[2])
    if h is None or int(match[1]) not in m.node_devices:
        return None
    return directory([*_OF_NODE, *(_DEMOTE if _can_demote(m, h) else ())])


_NODE = rf"/sys/devices/system/node/node{NUMBER}/hugepages"
ENTRIES = (
    (HUGEPAGES, lambda m, _: directory(h.name for h in m.hstates)),
    (rf"{HUGEPAGES}/hugepages-{NUMBER}kB", _dir),
    (rf"{HUGEPAGES}/hugepages-{NUMBER}kB/(\w+)", _file),
    (_NODE, _node_pools),
    (rf"{_NODE}/hugepages-{NUMBER}kB", _node_dir),
    (rf"{_NODE}/hugepages-{NUMBER}kB/(\w+)", _node_file),
)


# -- /proc ------------------------------------------------------------------------------

#: The files of /proc/sys/vm, which are about the default pool.
SYSCTLS = (
    "hugetlb_shm_group",
    "nr_hugepages",
    "nr_hugepages_mempolicy",
    "nr_overcommit_hugepages",
)


def read_sysctl(m: Machine, name: str) -> str:
    """Return the text of one of SYSCTLS: of nr_hugepages, what the pool is to have."""
    if name == "hugetlb_shm_group":
        return f"{m.hugetlb_shm_group}\n"
    h = m.default_hstate
    overcommit = name == "nr_overcommit_hugepages"
    return f"{h.nr_overcommit_huge_pages if overcommit else h.max_huge_pages}\n"


def write_sysctl(m: Machine, name: str, text: str) -> None:
    """Write one of SYSCTLS.

    :raises InvalidArgument: not a number, or outside what the kernel takes; nothing changes.
    """
    low, high = (_INT_MIN, _INT_MAX) if name == "hugetlb_shm_group" else (0, ULONG_MAX)
    number = parse_long(text)
    gigantic = name == "nr_overcommit_hugepages" and m.default_hstate.is_gigantic
    if gigantic or number is None or not low <= number[0] <= high:
        allowed = "nothing for gigantic pages" if gigantic else f"{low} to {high}"
        raise kernel_error(-errno.EINVAL, f"{name}: {shown(text.strip())}; allowed: {allowed}")
    if name == "hugetlb_shm_group":
        m.hugetlb_shm_group = number[0]
    elif name == "nr_overcommit_hugepages":
        nr_overcommit_hugepages_store(m, m.default_hstate, number[0])
    else:
        nr_hugepages_store(m, m.default_hstate, number[0])
