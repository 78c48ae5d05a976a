"""Recounts of pages in use: users' tables, page records, LRU lists and counters against each other.

Everything is done for all pages at once, so that a machine with millions of used pages is recounted
in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kmm.params import (
    PAGEBLOCK_NR_PAGES,
    PAGEBLOCK_ORDER,
    PG_DIRTY,
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
    live_entries,
    nodes_of,
    used_pages,
    zones_of,
)
from kmm.validate_zone import _equal, _none, _true
from kmm.vmstat import NODE_STAT_ITEMS, ZONE_STAT_ITEMS

if TYPE_CHECKING:
    from kmm.machine import Machine


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
    for number, user in m.users_by_number.items():
        slots = user.engine.slots[: user.engine.nr_slots]
        index = np.flatnonzero(slots)
        value = slots[index]
        present = value & np.uint64(SLOT_PRESENT) != 0
        swapped = value & np.uint64(SLOT_SWAPPED) != 0
        name = _name(m, number)
        odd = index[present == swapped]
        _true(not len(odd), f"{name}: slot {int(odd[0]) if len(odd) else 0}: has no one place")
        _equal(f"{name}: nr_present", user.engine.nr_present, int(np.count_nonzero(present)))
        _equal(f"{name}: nr_swapped", user.engine.nr_swapped, int(np.count_nonzero(swapped)))
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
    _none(pages.pfn[listed & (pages.flags & PG_LRU == 0)], "pages that are on no LRU list")
    _none(pages.pfn[~listed & (pages.flags & PG_LRU != 0)], "pages that no LRU list is for")
    node = nodes_of(m, pages.pfn)
    lru = np.where(listed, pages.lru, -1)
    for nid in m.nodes:
        for which in range(NR_LRU_LISTS):
            name = f"node {nid}: {LRU_NAMES[which]}"
            at, nr_live = live_entries(m, pages, nid, which)
            _equal(f"{name}: entries that count", nr_live, len(at))
            missing = (node == nid) & (lru == which)
            missing[at] = False
            _none(pages.pfn[missing], f"{name}: pages without entry")


def _lru_sizes(pages: UsedPages) -> dict[str, Ints]:
    lru = pages.lru
    on = np.where(pages.flags & PG_LRU != 0, pages.pages, 0)
    return {name: np.where(lru == i, on, 0) for i, name in enumerate(LRU_NAMES)}


def _of_node(m: Machine, pages: UsedPages) -> dict[str, Ints]:
    """How many pages each block adds to the node items that follow from what pages are."""
    n, kind = pages.pages, pages.kind
    mapped: Ints = np.zeros(1 << 16, dtype=np.int64)
    for number, user in m.users_by_number.items():
        mapped[number] = user.engine.mapped
    cache = np.where((kind == USER_SHMEM) | (kind == USER_FILE), n, 0)
    anon = np.where(kind == USER_ANON, n, 0)
    out = {f"nr_{name}": sizes for name, sizes in _lru_sizes(pages).items()}
    return out | {
        "nr_slab_reclaimable": np.where(kind == USER_SLAB_RECLAIMABLE, n, 0),
        "nr_slab_unreclaimable": np.where(kind == USER_SLAB_UNRECLAIMABLE, n, 0),
        "nr_isolated_anon": n * 0,
        "nr_isolated_file": n * 0,
        "nr_anon_pages": anon,
        "nr_mapped": cache * mapped[pages.user],
        "nr_file_pages": cache,
        "nr_dirty": np.where((kind == USER_FILE) & (pages.flags & PG_DIRTY != 0), n, 0),
        "nr_writeback": np.where(pages.flags & PG_WRITEBACK != 0, cache, 0),
        "nr_shmem": np.where(kind == USER_SHMEM, n, 0),
        "nr_anon_transparent_hugepages": np.where(pages.huge, anon, 0),
        "nr_kernel_stack": np.where(kind == USER_STACK, 4 * n, 0),
        "nr_page_table_pages": np.where(kind == USER_PAGE_TABLE, n, 0),
    }


def _of_zone(node: dict[str, Ints], pages: UsedPages) -> dict[str, Ints]:
    """The same for zones."""
    out = {f"nr_zone_{name}": node[f"nr_{name}"] for name in LRU_NAMES}
    return out | {
        "nr_zone_write_pending": node["nr_dirty"] + node["nr_writeback"],
        "nr_mlock": np.where(pages.flags & PG_MLOCKED != 0, pages.pages, 0),
    }


def _check_counters(m: Machine, pages: UsedPages) -> None:
    """What nodes and zones have counted since the machine began, against the pages there are."""
    zone, node = zones_of(m, pages.pfn), nodes_of(m, pages.pfn)
    by_node = _of_node(m, pages)
    for item, n in by_node.items():
        sums = np.bincount(node, weights=n, minlength=len(m.nodes)).astype(np.int64)
        at = NODE_STAT_ITEMS.index(item)
        for nid in m.nodes:
            have = m.memmap_engine.node_stat(nid)[at]
            _equal(f"node {nid}: {item}", have, int(sums[nid]))
    for item, n in _of_zone(by_node, pages).items():
        sums = np.bincount(zone, weights=n, minlength=len(m.all_zones())).astype(np.int64)
        at = ZONE_STAT_ITEMS.index(item)
        for z in m.all_zones():
            have = z.stat()[at]
            _equal(f"node {z.nid} zone {z.name}: {item}", have, int(sums[z.index]))


def check_users(m: Machine) -> None:
    """Users' slots, the records of their pages, LRU lists, and what is counted of all that."""
    named = {user.engine.number for user in m.users.values()}
    known = m.memmap_engine.user_numbers()
    _equal("users", (sorted(named), sorted(m.users_by_number)), (known, known))
    slots = _present_slots(m)
    pages, state = used_pages(m)
    _check_slots(m, slots, pages, state)
    _check_lru(m, pages)
    _check_counters(m, pages)
