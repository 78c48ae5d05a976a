"""Recounts of the pools of huge pages: from their pages, and from those who use them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from kmm import _hugetlb
from kmm.hugetlb import HState, nid_of
from kmm.hugetlb_move import flags_of
from kmm.hugetlbfs import HugetlbUser
from kmm.params import PG_ACTIVE, PG_ISOLATED, PG_USER
from kmm.validate_zone import _equal, _true

if TYPE_CHECKING:
    from kmm.machine import Machine


def check_hugetlb(m: Machine) -> None:
    """Every pool's counts against its free pages, its users and the records."""
    known: set[int] = set()
    for h in m.hstates:
        known |= _check_pool(m, h)
    found: set[int] = set()
    for zone in m.all_zones():
        if zone.spanned_pages:
            heads = _hugetlb.hugetlb_heads(m.memmap_engine, zone.zone_start_pfn, zone.zone_end_pfn)
            found |= set(heads)
    _equal("huge pages in the records", sorted(found - known)[:4], sorted(known - found)[:4])


def _check_pool(m: Machine, h: HState) -> set[int]:
    """One pool; the pfns of its pages."""
    free = {pfn for pages in h.free.values() for pfn in pages}
    for nid, pages in h.free.items():
        for pfn in pages:
            name = f"{h.name}: free page {pfn:#x}"
            _true(m.memmap_engine.is_allocated(pfn, h.order), f"{name}: is no block of its order")
            _equal(f"{name}: node", nid, nid_of(m, pfn))
            marks = flags_of(m, pfn) & (PG_USER | PG_ACTIVE | PG_ISOLATED)
            _equal(f"{name}: marks", marks, PG_USER)
    used: set[int] = set()
    reserved = 0
    for user in m.users.values():
        if not isinstance(user, HugetlbUser) or user.hstate is not h:
            continue
        pfns = user.pfns()
        _equal(f"{user.name!r}: places for reservations", len(user.reserved), user.pages)
        there = set(pfns[pfns >= 0].tolist())
        _true(not there & (free | used), f"{h.name}: a page of {user.name!r} is another's too")
        _true(
            all(flags_of(m, pfn) & PG_ACTIVE for pfn in there),
            f"{h.name}: a page of {user.name!r} is not in use",
        )
        used |= there
        reserved += int(np.count_nonzero(user.reserved))
        _true(
            not bool((user.reserved & (pfns >= 0)).any()),
            f"{h.name}: {user.name!r} holds a reservation for a page that it has",
        )
    nodes = Counter(nid_of(m, pfn) for pfn in free | used)
    for nid, count in h.nr_huge_pages_node.items():
        _equal(f"{h.name}: pages of node {nid}", count, nodes[nid])
        surplus = h.surplus_huge_pages_node[nid]
        _true(0 <= surplus <= count, f"{h.name}: {surplus} of {count} on node {nid} are surplus")
    _equal(f"{h.name}: reserved", h.resv_huge_pages, reserved)
    _true(reserved <= len(free), f"{h.name}: {reserved} reserved, but {len(free)} are free")
    return free | used
