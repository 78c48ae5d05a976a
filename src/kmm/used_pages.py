"""What the records of all used pages say, read out into arrays for recounts and dumps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kmm.params import (
    PAGEBLOCK_NR_PAGES,
    PAGEBLOCK_ORDER,
    PG_ACTIVE,
    PG_LRU,
    PG_MLOCKED,
    PG_USER,
    USER_FILE,
)
from kmm.sparse import SECTION_IS_ONLINE, sections_seen

if TYPE_CHECKING:
    from kmm.machine import Machine

#: The order of a node's lists, and how those pages are called that are only counted.
LRU_NAMES = ("inactive_anon", "active_anon", "inactive_file", "active_file", "unevictable")
NR_LRU_LISTS = 4
LRU_UNEVICTABLE = 4

_LRU_PFN = np.uint64((1 << 34) - 1)
_LRU_TAG_SHIFT = np.uint64(34)
_PART = 4096  # pageblocks whose page records are looked at in one go
_BLOCK_IN_USE = 3  # a pageblock's kind
_BLOCK_DIRTY = 0x80

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(slots=True)
class UsedPages:
    """Used blocks of known users, one entry each, in the order of their pfns.

    ``index`` is the block's at its user, ``order`` its size, ``huge`` whether its record is its
    pageblock's, ``kind`` and ``user_order`` what its user is.
    """

    pfn: Ints
    user: Ints
    index: Ints
    tag: Ints
    flags: Ints
    order: Ints
    huge: Bools
    kind: Ints
    user_order: Ints

    def of(self, which: Bools | Ints) -> UsedPages:
        """Return some of the entries."""
        return UsedPages(*(getattr(self, name)[which] for name in self.__slots__))

    @property
    def pages(self) -> Ints:
        """How many pages each block has."""
        return np.int64(1) << self.order


def lists_of(kind: Ints, flags: Ints) -> Ints:
    """Return the LRU list that pages are on by their users' kinds and their marks."""
    lists = 2 * (kind == USER_FILE) + (flags & PG_ACTIVE != 0)
    return np.where(flags & PG_MLOCKED != 0, LRU_UNEVICTABLE, lists)


def _small(m: Machine, blocks: Ints) -> list[Ints]:
    """Read the page records of some pageblocks: pfn, user, index, tag, flags, state byte."""
    records = m.memmap.reshape(-1, PAGEBLOCK_NR_PAGES)[blocks]
    row, column = np.nonzero(records["flags"] & PG_USER)
    page = records[row, column]
    pfn = blocks[row] * PAGEBLOCK_NR_PAGES + column
    link, back = page["next"].astype(np.int64), page["prev"].astype(np.int64)
    link_hi, back_hi = page["next_hi"].astype(np.int64), page["prev_hi"].astype(np.int64)
    return [
        pfn,
        back & 0xFF | back_hi << 8,
        link | (link_hi & 3) << 32,
        link_hi >> 2 | back >> 8 << 6,
        page["flags"].astype(np.int64),
        m.page_states[pfn].astype(np.int64),
    ]


def _huge(m: Machine, blocks: Ints) -> list[Ints]:
    """Read the records of pageblocks: the same, and the block's order instead of a state byte."""
    block = m.pageblocks[blocks]
    link, back = block["next"].astype(np.int64), block["prev"].astype(np.int64)
    return [
        blocks * PAGEBLOCK_NR_PAGES,
        back & 0xFF | block["mt"].astype(np.int64) << 8,
        link & 0x3FFFFFF,
        link >> 26 | back >> 8 << 6,
        block["flags"].astype(np.int64),
        block["order"].astype(np.int64),
    ]


def user_tables(m: Machine) -> tuple[Ints, Ints]:
    """Return kind and order of each user by its number, kind 0 where there is none."""
    kinds: Ints = np.zeros(1 << 16, dtype=np.int64)
    orders = np.zeros_like(kinds)
    for number, user in m.memmap_engine.page_users().items():
        kinds[number], orders[number] = user.kind, user.order
    return kinds, orders


def used_pages(m: Machine) -> tuple[UsedPages, Ints]:
    """Read the records of all pages of online sections that say that somebody uses them.

    :return: the pages; the state byte of each, of huge ones 0.
    """
    sections = np.flatnonzero(sections_seen(m)["flags"] & SECTION_IS_ONLINE)
    blocks = (sections[:, None] * 64 + np.arange(64)).reshape(-1)
    records = m.pageblocks[blocks]
    dirty = blocks[records["state"] & _BLOCK_DIRTY != 0]
    parts = [_small(m, part) for part in np.array_split(dirty, len(dirty) // _PART + 1)]
    small = [np.concatenate(column) for column in zip(*parts, strict=True)]
    taken = records["kind"] == _BLOCK_IN_USE
    huge = _huge(m, blocks[taken & (records["flags"] & PG_USER != 0)])
    kinds, orders = user_tables(m)
    pfn, user, index, tag, flags, last = (
        np.concatenate(pair).astype(np.int64, copy=False) for pair in zip(small, huge, strict=True)
    )
    of_block = np.arange(len(pfn)) >= len(small[0])
    # A pageblock's record counts in units of 512 where its user has single pages.
    index = index << np.where(of_block & (orders[user] == 0), PAGEBLOCK_ORDER, 0)
    order = np.where(of_block, last, last & 0xF)
    state = np.where(of_block, 0, last)
    pages = UsedPages(pfn, user, index, tag, flags, order, of_block, kinds[user], orders[user])
    if not of_block.any():
        return pages, state
    by_pfn = np.argsort(pfn, kind="stable")
    return pages.of(by_pfn), state[by_pfn]


def live_entries(m: Machine, pages: UsedPages, nid: int, lru: int) -> tuple[Ints, int]:
    """Return a node's LRU list as it is: indices into the pages, the oldest first.

    :return: those; how many entries the list itself says count.
    """
    entries, nr_live = m.memmap_engine.lru_entries(nid, lru)
    pfn = (entries & _LRU_PFN).astype(np.int64)
    tag = (entries >> _LRU_TAG_SHIFT).astype(np.int64)
    if not len(pages.pfn):
        return np.zeros(0, dtype=np.int64), nr_live
    at = np.minimum(np.searchsorted(pages.pfn, pfn), len(pages.pfn) - 1)
    flags = pages.flags[at]
    counts = (pages.pfn[at] == pfn) & (pages.tag[at] == tag) & (flags & PG_LRU != 0)
    counts &= lists_of(pages.kind[at], flags) == lru
    counts &= nodes_of(m, pages.pfn[at]) == nid
    return at[counts], nr_live


def zones_of(m: Machine, pfn: Ints) -> Ints:
    """Return the zone of each page, an index into the table of zones, -1 for none."""
    zones: Ints = m.pageblocks["zone"][pfn >> PAGEBLOCK_ORDER].astype(np.int64) - 1
    return zones


def nodes_of(m: Machine, pfn: Ints) -> Ints:
    """Return the node of each page by its zone, -1 for none."""
    table = np.array([zone.nid for zone in m.all_zones()] + [-1])
    nodes: Ints = table[zones_of(m, pfn)]
    return nodes
