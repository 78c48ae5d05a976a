"""Pools of huge pages at boot: which there are, and what the command line wants (mm/hugetlb.c)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kmm.config import parse_cmdline
from kmm.errors import ConfigError, shown
from kmm.gfp import __GFP_THISNODE
from kmm.hugetlb import (
    PMD_ORDER,
    PUD_ORDER,
    HState,
    alloc_fresh_huge_page,
    enqueue_huge_page,
    free_huge_page,
)
from kmm.hugetlb_pool import alloc_pool_huge_page
from kmm.hugetlbfs import HugetlbUser
from kmm.params import FILL_KERNEL, PAGE_SHIFT, PAGEBLOCK_ORDER, PG_ACTIVE

if TYPE_CHECKING:
    from kmm.machine import Machine

_KIND_ALLOCATED = 3
_SUFFIX = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}


@dataclass(slots=True)
class _Wish:
    """What the command line wants of one pool."""

    pages: int = 0
    nodes: dict[int, int] = field(default_factory=dict)


def memparse(text: str) -> int:
    """Return a size in bytes as the kernel reads one; what it does not understand counts as 0."""
    match = re.match(r"(0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20})([KMGTPEkmgtpe]?)", text)
    if not match:
        return 0
    octal = match[1].startswith("0") and match[1].isdigit() and len(match[1]) > 1
    try:
        number = int(match[1], 8) if octal else int(match[1], 0)
    except ValueError:
        return 0
    return (number << _SUFFIX[match[2].upper()]) & ((1 << 64) - 1)


class _Parameters:
    """Reads hugepagesz=, hugepages= and default_hugepagesz= in their order."""

    def __init__(self, m: Machine) -> None:
        self.m = m
        self.orders = [PMD_ORDER, PUD_ORDER] if m.config.pdpe1gb else [PMD_ORDER]
        self.wishes: dict[int | None, _Wish] = {None: _Wish()}  # None: the pool that is default
        self.current: int | None = None
        self.last: int | None = -1  # whose pages were told last
        self.valid = True
        self.default = PMD_ORDER
        self.default_given = False

    def read(self, name: str, value: str) -> None:
        """Take one parameter."""
        if name == "hugepages":
            self._hugepages(value)
            return
        self.valid = False
        order = memparse(value).bit_length() - 1 - PAGE_SHIFT
        if order not in self.orders or memparse(value) != 1 << (order + PAGE_SHIFT):
            self.m.printk(f"HugeTLB: unsupported {name}={value}")
        elif name == "hugepagesz":
            self._hugepagesz(order, value)
        else:
            self._default_hugepagesz(order, value)

    def _hugepagesz(self, order: int, value: str) -> None:
        known = order in self.wishes
        new_for_default = self.default_given and order == self.default
        if known and not (new_for_default and not self.wishes[order].pages):
            self.m.printk(f"HugeTLB: hugepagesz={value} specified twice, ignoring")
            return
        self.wishes.setdefault(order, _Wish())
        self.current, self.valid = order, True

    def _default_hugepagesz(self, order: int, value: str) -> None:
        if self.default_given:
            self.m.printk(f"HugeTLB: default_hugepagesz previously specified, ignoring {value}")
            return
        self.wishes.setdefault(order, _Wish())
        self.current, self.valid = order, True
        self.default, self.default_given = order, True
        if self.wishes[None].pages:
            self.wishes[order] = self.wishes.pop(None)
            self.wishes[None] = _Wish()

    def _hugepages(self, value: str) -> None:
        if not self.valid:
            self.m.printk(
                f"HugeTLB: hugepages={value} does not follow a valid hugepagesz, ignoring"
            )
            self.valid = True
            return
        if self.current == self.last:
            self.m.printk(
                "HugeTLB: hugepages= specified twice without interleaving hugepagesz=, "
                f"ignoring hugepages={value}"
            )
            return
        wish = self.wishes[self.current]
        for i, part in enumerate(value.split(",")):
            match = re.match(r"([0-9]{1,18})(?::([0-9]{1,18}))?", part)
            node = int(match[1]) if match and match[2] is not None else None
            if (
                match is None
                or (node is None and i)
                or (node is not None and node not in self.m.n_online)
            ):
                self.m.printk(f"HugeTLB: Invalid hugepages parameter {part}")
                return
            if node is None:
                wish.pages = int(match[1])
                break
            wish.nodes[node] = int(match[2])
            wish.pages += int(match[2])
        self.last = self.current

    def wish(self, order: int) -> _Wish:
        """What is wanted of a pool."""
        wish = self.wishes.get(order, _Wish())
        if order == self.default and not wish.pages:
            return self.wishes[None]
        return wish


def size_name(h: HState) -> str:
    """Return a pool's page size as its messages have it."""
    return f"{h.size >> 30}.00 GiB" if h.size >> 30 else f"{h.size >> 20}.00 MiB"


def _alloc_pages(m: Machine, h: HState, wish: _Wish) -> None:
    """Fill a pool at boot, node by node where that is asked for (hugetlb_hstate_alloc_pages)."""
    got = 0
    for nid, pages in wish.nodes.items():
        for i in range(pages):
            pfn = alloc_fresh_huge_page(m, h, h.alloc_mask | __GFP_THISNODE, nid)
            if pfn is None:
                m.printk(
                    f"HugeTLB: allocating {pages} of page size {size_name(h)} failed node{nid}.  "
                    f"Only allocated {i} hugepages."
                )
                break
            free_huge_page(m, h, pfn)
            got += 1
    noretry: set[int] = set()
    while not wish.nodes and got < wish.pages:
        if not alloc_pool_huge_page(m, h, sorted(m.n_memory), noretry):
            m.printk(
                f"HugeTLB: allocating {wish.pages} of page size {size_name(h)} failed.  "
                f"Only allocated {got} hugepages."
            )
            break
        got += 1
    h.max_huge_pages = got


def _whole_blocks(m: Machine, nid: int) -> list[int]:
    """Return a node's pageblocks that somebody unknown uses in whole, the highest first."""
    index = np.array([z.index + 1 for z in m.nodes[nid].zones])
    first = min((z.zone_start_pfn for z in m.nodes[nid].zones if z.populated), default=0)
    last = max((z.zone_end_pfn for z in m.nodes[nid].zones if z.populated), default=0)
    blocks = m.pageblocks[first >> PAGEBLOCK_ORDER : last >> PAGEBLOCK_ORDER]
    whole = (blocks["state"] == FILL_KERNEL) & np.isin(blocks["zone"], index)
    found: list[int] = (np.flatnonzero(whole) + (first >> PAGEBLOCK_ORDER)).tolist()
    return found[::-1]


def load_pools(m: Machine, files: Mapping[str, str]) -> None:
    """Give the default pool what a real machine's files show, in pages that somebody unknown has.

    Its pages in use, and reservations, belong to a user of that pool.

    :param files: path to text; of /proc/meminfo and those of nodes the huge pages are read.
    :raises ConfigError: if the number of surplus pages that there may be is none.
    """
    h = m.default_hstate
    if h.is_gigantic:
        return
    h.nr_overcommit_huge_pages = _overcommit(files)
    used: list[int] = []
    for nid in sorted(m.n_memory):
        text = files.get(f"/sys/devices/system/node/node{nid}/meminfo", "")
        counts = dict(re.findall(r"HugePages_(\w+): +([0-9]{1,12})$", text, re.M))
        total, free = int(counts.get("Total", 0)), int(counts.get("Free", 0))
        for i, block in enumerate(_whole_blocks(m, nid)[:total]):
            m.pageblocks["state"][block] = 0
            m.pageblocks["kind"][block] = _KIND_ALLOCATED
            m.pageblocks["order"][block] = h.order
            h.nr_huge_pages_node[nid] += 1
            if i < free:
                enqueue_huge_page(m, h, block << PAGEBLOCK_ORDER)
            else:
                used.append(block << PAGEBLOCK_ORDER)
        surplus = int(counts.get("Surp", 0))
        h.surplus_huge_pages_node[nid] = min(surplus, h.nr_huge_pages_node[nid])
    text = files.get("/proc/meminfo", "")
    match = re.search(r"^HugePages_Rsvd: +([0-9]{1,12})$", text, re.M)
    reserved = min(int(match[1]) if match else 0, h.free_huge_pages)
    if used or reserved:
        user = HugetlbUser(m, "hugetlb since before", len(used) + reserved, reserve=False)
        for index, pfn in enumerate(used):
            user.engine.attach(m, index, pfn, PG_ACTIVE)
        user.reserved[len(used) :] = True
        h.resv_huge_pages = reserved
    h.max_huge_pages = h.persistent_huge_pages


def _overcommit(files: Mapping[str, str]) -> int:
    path = "/proc/sys/vm/nr_overcommit_hugepages"
    text = files.get(path, "").strip() or "0"
    if not re.fullmatch(r"[0-9]{1,20}", text) or int(text) >= 1 << 64:
        raise ConfigError(f"{path}: {shown(text)}; allowed: a number below 2^64")
    return int(text)


def hugetlb_init(m: Machine, fill: bool = True) -> None:
    """Make the machine's pools, and give them the pages that the command line wants.

    :param fill: False for a machine whose files tell what its pools have.
    """
    parameters = _Parameters(m)
    for name, value in m.config.cmdline_items or parse_cmdline(m.config.cmdline):
        if name in ("hugepages", "hugepagesz", "default_hugepagesz"):
            parameters.read(name, value or "")
    m.hstates = [HState(m, order) for order in reversed(parameters.orders)]
    m.default_hstate_idx = [h.order for h in m.hstates].index(parameters.default)
    for h in m.hstates if fill else []:
        wish = parameters.wish(h.order)
        if wish.pages:
            _alloc_pages(m, h, wish)
