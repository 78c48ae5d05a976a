"""Recounts of pages in use: users' tables, page records, LRU lists and counters against each other.

The engine walks slots, lists and records once (_recount), so that a machine with hundreds of
gigabytes in use is recounted in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kmm._recount import Recount
from kmm._tokens import wrong_token
from kmm.params import (
    PG_ACTIVE,
    PG_DIRTY,
    PG_LRU,
    PG_MLOCKED,
    PG_WRITEBACK,
    SLOT_PFN,
    USER_ANON,
    USER_FILE,
    USER_PAGE_TABLE,
    USER_SHMEM,
    USER_SLAB_RECLAIMABLE,
    USER_SLAB_UNRECLAIMABLE,
    USER_STACK,
)
from kmm.used_pages import LRU_NAMES, NR_LRU_LISTS, Ints, lists_of
from kmm.validate_zone import _equal, _true
from kmm.vmstat import NODE_STAT_ITEMS, ZONE_STAT_ITEMS

if TYPE_CHECKING:
    from kmm.machine import Machine

_MARKS = (PG_LRU, PG_ACTIVE, PG_MLOCKED, PG_DIRTY, PG_WRITEBACK)  # those that are counted


def _name(m: Machine, number: int) -> str:
    user = m.users_by_number.get(number)
    return f"user {user.name!r}" if user is not None else f"user {number}"


def _no_slot(m: Machine, faults: dict[int, int], what: str) -> None:
    """Stop at the first slot of which something is wrong."""
    for number, index in faults.items():
        if index >= 0:
            pfn = int(m.memmap_engine.page_users()[number].slots[index]) & SLOT_PFN
            _true(False, f"{_name(m, number)}: slot {index}, page {pfn:#x}: {what}")


def _no_page(pfn: int, what: str) -> None:
    _true(pfn < 0, f"{what}: pfn {pfn:#x}")


def _check_slots(m: Machine, recount: Recount) -> None:
    """Each slot is in one place, counted, and its page's record says that it is that slot's."""
    nobody, other, size = {}, {}, {}
    for number, user in m.memmap_engine.page_users().items():
        present, swapped, (odd, *wrong) = recount.slots(user)
        name = _name(m, number)
        _true(odd < 0, f"{name}: slot {odd}: has no one place")
        _equal(f"{name}: nr_present", user.nr_present, present)
        _equal(f"{name}: nr_swapped", user.nr_swapped, swapped)
        nobody[number], other[number], size[number] = wrong
    _no_slot(m, nobody, "its record names no user")
    _no_slot(m, other, "its record names another user or index")
    _no_slot(m, size, "is of another size than its slot says")


def _check_pages(m: Machine, recount: Recount) -> npt.NDArray[np.int64]:
    """Each used page is a slot's; of a kind that is listed, it has one entry, on its own list.

    :return: how many pages of each class each zone has.
    """
    lists = [(nid, lru) for nid in m.nodes for lru in range(NR_LRU_LISTS)]
    entries = {(nid, lru): recount.lru_entries(nid, lru) for nid, lru in lists}
    (order, not_held, isolated, unlisted, listed), missing, classes = recount.pages()
    _no_page(order, "used pages that are no block of their user's order")
    _no_page(not_held, "used pages that their user's slots do not hold")
    _no_page(isolated, "isolated pages that nobody moves")
    _no_page(unlisted, "pages that are on no LRU list")
    _no_page(listed, "pages that no LRU list is for")
    for nid, lru in lists:
        name = f"node {nid}: {LRU_NAMES[lru]}"
        found, nr_live = entries[nid, lru]
        _equal(f"{name}: entries that count", nr_live, found)
        _no_page(int(missing[nid, lru]), f"{name}: pages without entry")
    return classes


@dataclass(slots=True)
class _Alike:
    """Pages that add to the same counters: where, what, and how many there are of them."""

    zone: Ints
    kind: Ints
    flags: Ints
    mapped: Ints
    huge: Ints
    n: Ints


def _alike(classes: npt.NDArray[np.int64]) -> _Alike:
    """Read what pages of each class are, which is in the bits of its number."""
    zone, left = np.nonzero(classes)
    n, flags = classes[zone, left], left * 0
    for mark in reversed(_MARKS):
        flags |= (left & 1) * mark
        left = left >> 1
    return _Alike(zone, left >> 2, flags, left >> 1 & 1, left & 1, n)


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


def _check_counters(m: Machine, classes: npt.NDArray[np.int64]) -> None:
    """What nodes and zones have counted since the machine began, against the pages there are."""
    alike, zones = _alike(classes), m.all_zones()
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
    recount = Recount(m.memmap_engine)
    _check_slots(m, recount)
    _check_counters(m, _check_pages(m, recount))
    _check_tokens(m)
