"""Recounts of pages in use: users' tables, page records, LRU lists and counters against each other.

Everything is done for all pages at once, so that a machine with millions of used pages is recounted
in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kmm._tokens import wrong_token
from kmm.params import (
    PAGEBLOCK_NR_PAGES,
    PAGEBLOCK_ORDER,
    PG_ACTIVE,
    PG_DIRTY,
    PG_HWPOISON,
    PG_ISOLATED,
    PG_LRU,
    PG_MLOCKED,
    PG_WRITEBACK,
    SLOT_HUGE,
    SLOT_PFN,
    SLOT_PRESENT,
    SLOT_SWAPPED,
    STATE_ALLOCATED,
    STATE_MARKED,
    USER_ANON,
    USER_FILE,
    USER_PAGE_TABLE,
    USER_SHMEM,
    USER_SLAB_RECLAIMABLE,
    USER_SLAB_UNRECLAIMABLE,
    USER_STACK,
)
from kmm.used_pages import (
    LRU_NAMES,
    NR_LRU_LISTS,
    Bools,
    Ints,
    UsedPages,
    lists_of,
    live_entries,
    nodes_of,
    used_pages,
    zones_of,
)
from kmm.validate_zone import _equal, _none, _true
from kmm.vmstat import NODE_STAT_ITEMS, ZONE_STAT_ITEMS

if TYPE_CHECKING:
    from kmm.machine import Machine

_MARKS = (PG_LRU, PG_ACTIVE, PG_MLOCKED, PG_DIRTY, PG_WRITEBACK)  # those that are counted


@dataclass(slots=True)
class _Slots:
    """Slots with a page of all users: whose, which, the page, whether part of a huge one."""

    user: Ints
    index: Ints
    pfn: Ints
    huge: Bools


def _name(m: Machine, number: int) -> str:
    user = m.users_by_number.get(number)
    return f"user {user.name!r}" if user is not None else f"user {number}"


def _present_slots(m: Machine) -> _Slots:
    """Read the tables of all users, and compare their counts."""
    numbers, indices, values = [], [], []
    for number, user in m.memmap_engine.page_users().items():
        slots = user.slots[: user.nr_slots]
        index = np.flatnonzero(slots)
        value = slots[index]
        present = value & np.uint64(SLOT_PRESENT) != 0
        swapped = value & np.uint64(SLOT_SWAPPED) != 0
        name = _name(m, number)
        odd = index[present == swapped]
        _true(not len(odd), f"{name}: slot {int(odd[0]) if len(odd) else 0}: has no one place")
        _equal(f"{name}: nr_present", user.nr_present, int(np.count_nonzero(present)))
        _equal(f"{name}: nr_swapped", user.nr_swapped, int(np.count_nonzero(swapped)))
        numbers.append(np.full(int(np.count_nonzero(present)), number))
        indices.append(index[present])
        values.append(value[present])
    none = [np.zeros(0, dtype=np.int64)]
    value = np.concatenate([*values, np.zeros(0, dtype=np.uint64)])
    return _Slots(
        np.concatenate(numbers + none),
        np.concatenate(indices + none),
        (value & np.uint64(SLOT_PFN)).astype(np.int64),
        value & np.uint64(SLOT_HUGE) != 0,
    )


def _no_slot(m: Machine, slots: _Slots, wrong: Bools, what: str) -> None:
    """Stop at the first slot of which something is wrong."""
    at = np.flatnonzero(wrong)
    if len(at):
        user, index, pfn = (int(a[at[0]]) for a in (slots.user, slots.index, slots.pfn))
        _true(False, f"{_name(m, user)}: slot {index}, page {pfn:#x}: {what}")


def _check_slots(m: Machine, slots: _Slots, pages: UsedPages, state: Ints) -> None:
    """Each slot's page says that it is that slot's, and each used page is a slot's."""
    inside = slots.pfn & (PAGEBLOCK_NR_PAGES - 1)
    head = np.where(slots.huge, slots.pfn - inside, slots.pfn)
    index = np.where(slots.huge, slots.index - inside, slots.index)
    at = np.searchsorted(pages.pfn, head)
    there = at < len(pages.pfn)
    at = np.where(there, at, 0)
    if len(pages.pfn):
        there &= pages.pfn[at] == head
    _no_slot(m, slots, ~there, "its record names no user")
    if len(slots.pfn):
        back = (pages.user[at] == slots.user) & (pages.index[at] == index)
        _no_slot(m, slots, ~back, "its record names another user or index")
        large = slots.huge | (pages.user_order[at] >= PAGEBLOCK_ORDER)
        _no_slot(m, slots, large != pages.huge[at], "is of another size than its slot says")
    order = np.where(pages.huge & (pages.user_order == 0), PAGEBLOCK_ORDER, pages.user_order)
    byte = STATE_MARKED | STATE_ALLOCATED | pages.user_order
    wrong = (pages.order != order) | ~pages.huge & (state != byte)
    _none(pages.pfn[wrong], "used pages that are no block of their user's order")
    slots_of = np.where(pages.huge & (pages.user_order == 0), PAGEBLOCK_NR_PAGES, 1)
    held = np.bincount(at, minlength=len(pages.pfn)) if len(slots.pfn) else slots_of * 0
    _none(pages.pfn[held != slots_of], "used pages that their user's slots do not hold")


def _check_lru(m: Machine, pages: UsedPages) -> None:
    """Each page of a kind that is listed has one entry, on the list that is its own."""
    _none(pages.pfn[pages.flags & PG_ISOLATED != 0], "isolated pages that nobody moves")
    listed = np.isin(pages.kind, (USER_ANON, USER_SHMEM, USER_FILE))
    # A broken page is taken off its list, also where its file keeps it.
    nowhere = pages.flags & (PG_LRU | PG_HWPOISON) == 0
    _none(pages.pfn[listed & nowhere], "pages that are on no LRU list")
    _none(pages.pfn[~listed & (pages.flags & PG_LRU != 0)], "pages that no LRU list is for")
    node = nodes_of(m, pages.pfn)
    listed &= pages.flags & PG_LRU != 0
    lru = np.where(listed, lists_of(pages.kind, pages.flags), -1)
    for nid in m.nodes:
        for which in range(NR_LRU_LISTS):
            name = f"node {nid}: {LRU_NAMES[which]}"
            at, nr_live = live_entries(m, pages, nid, which)
            _equal(f"{name}: entries that count", nr_live, len(at))
            missing = (node == nid) & (lru == which)
            missing[at] = False
            _none(pages.pfn[missing], f"{name}: pages without entry")


@dataclass(slots=True)
class _Alike:
    """Pages that add to the same counters: where, what, and how many there are of them."""

    zone: Ints
    kind: Ints
    flags: Ints
    mapped: Ints
    huge: Ints
    n: Ints


def _alike(m: Machine, pages: UsedPages) -> _Alike:
    """Count pages that are alike, so that not each of them is looked at for every counter."""
    mapped: Ints = np.zeros(1 << 16, dtype=np.int64)
    for number, user in m.memmap_engine.page_users().items():
        mapped[number] = user.mapped
    key = zones_of(m, pages.pfn)
    for part, bits in (
        (pages.kind, 4),
        (mapped[pages.user], 1),
        (pages.huge, 1),
        *((pages.flags & mark != 0, 1) for mark in _MARKS),
    ):
        key <<= bits
        key |= part
    n = np.bincount(key, weights=pages.pages).astype(np.int64)
    left = np.flatnonzero(n)
    n, flags = n[left], left * 0
    for mark in reversed(_MARKS):
        flags |= (left & 1) * mark
        left >>= 1
    return _Alike(left >> 6, left >> 2 & 0xF, flags, left >> 1 & 1, left & 1, n)


def _of_node(p: _Alike) -> dict[str, Ints]:
    """How many pages add to each node item that follows from what pages are."""
    lru = np.where(p.flags & PG_LRU != 0, lists_of(p.kind, p.flags), -1)
    out = {f"nr_{name}": np.where(lru == i, p.n, 0) for i, name in enumerate(LRU_NAMES)}
    cache = np.where((p.kind == USER_SHMEM) | (p.kind == USER_FILE), p.n, 0)
    anon = np.where(p.kind == USER_ANON, p.n, 0)
    dirty = (p.kind == USER_FILE) & (p.flags & PG_DIRTY != 0)
    return out | {
        "nr_slab_reclaimable": np.where(p.kind == USER_SLAB_RECLAIMABLE, p.n, 0),
        "nr_slab_unreclaimable": np.where(p.kind == USER_SLAB_UNRECLAIMABLE, p.n, 0),
        "nr_isolated_anon": p.n * 0,
        "nr_isolated_file": p.n * 0,
        "nr_anon_pages": anon,
        "nr_mapped": cache * p.mapped,
        "nr_file_pages": cache,
        "nr_dirty": np.where(dirty, p.n, 0),
        "nr_writeback": np.where(p.flags & PG_WRITEBACK != 0, cache, 0),
        "nr_shmem": np.where(p.kind == USER_SHMEM, p.n, 0),
        "nr_anon_transparent_hugepages": anon * p.huge,
        "nr_kernel_stack": np.where(p.kind == USER_STACK, 4 * p.n, 0),
        "nr_page_table_pages": np.where(p.kind == USER_PAGE_TABLE, p.n, 0),
    }


def _of_zone(node: dict[str, Ints], p: _Alike) -> dict[str, Ints]:
    """The same for zones."""
    out = {f"nr_zone_{name}": node[f"nr_{name}"] for name in LRU_NAMES}
    return out | {
        "nr_zone_write_pending": node["nr_dirty"] + node["nr_writeback"],
        "nr_mlock": np.where(p.flags & PG_MLOCKED != 0, p.n, 0),
    }


def _check_counters(m: Machine, pages: UsedPages) -> None:
    """What nodes and zones have counted since the machine began, against the pages there are."""
    alike, zones = _alike(m, pages), m.all_zones()
    by_node = _of_node(alike)
    node = np.array([z.nid for z in zones])[alike.zone]
    stats = {nid: m.memmap_engine.node_stat(nid) for nid in m.nodes}
    for item, n in by_node.items():
        at = NODE_STAT_ITEMS.index(item)
        for nid, stat in stats.items():
            _equal(f"node {nid}: {item}", stat[at], int(n[node == nid].sum()))
    zone_stats = [z.stat() for z in zones]
    for item, n in _of_zone(by_node, alike).items():
        at = ZONE_STAT_ITEMS.index(item)
        for z, stat in zip(zones, zone_stats, strict=True):
            want = int(n[alike.zone == z.index].sum())
            _equal(f"node {z.nid} zone {z.name}: {item}", stat[at], want)


def _check_tokens(m: Machine) -> None:
    """What was written is where it has to be: in memory, on the swap device, the backing store."""
    for number, user in m.memmap_engine.page_users().items():
        wrong = wrong_token(user)
        if wrong is not None:
            at, have, want = wrong
            what = f"{_name(m, number)}: slot {at}: holds the token {have:#x}"
            _true(False, f"{what}, but {want:#x} was written")


def check_users(m: Machine) -> None:
    """Users' slots, the records of their pages, LRU lists, and what is counted of all that."""
    named = {user.engine.number for user in m.users.values()}
    named |= {h.pool.engine.number for h in m.hstates if h.pool is not None}
    known = m.memmap_engine.user_numbers()
    _equal("users", (sorted(named), sorted(m.users_by_number)), (known, known))
    slots = _present_slots(m)
    pages, state = used_pages(m)
    _check_slots(m, slots, pages, state)
    _check_lru(m, pages)
    _check_counters(m, pages)
    _check_tokens(m)
