"""Which zone is asked next: fallback orders and zonelists (mm/page_alloc.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kmm import _watermarks
from kmm.gfp import __GFP_THISNODE, gfp_zone
from kmm.mmzone import PgData, Zone
from kmm.params import MIGRATE_TYPES, PAGEBLOCK_NR_PAGES, ZONE_MOVABLE, ZONE_NAMES
from kmm.trace import traced

if TYPE_CHECKING:
    from kmm.machine import Machine


def zones_of(m: Machine, nid: int, gfp: int, nodes: int) -> list[Zone]:
    """The zones that may serve a request, in the order in which they are asked.

    :param nid: node whose zonelist is used; nodes: bit k lets node k give.
    """
    pgdat, highest = m.nodes[nid], gfp_zone(gfp)
    zonelist = pgdat.nofallback if gfp & __GFP_THISNODE else pgdat.zonelist
    return [z for z in zonelist if z.zone_idx <= highest and nodes >> z.nid & 1]


def find_next_best_node(m: Machine, nid: int, used: set[int]) -> int | None:
    """Return the nearest unused node with memory, ``nid`` itself first; None when all are used."""
    if nid not in used:
        used.add(nid)
        return nid
    best: tuple[int, int] | None = None
    for n in sorted(m.n_memory):
        if n in used:
            continue
        value = m.node_distance(nid, n) + (n < nid) + bool(m.cpus_of_node(n))
        value = value * 1024 + m.node_load.get(n, 0)
        if best is None or value < best[0]:
            best = (value, n)
    if best is None:
        return None
    used.add(best[1])
    return best[1]


def build_zonerefs_node(m: Machine, pgdat: PgData) -> list[Zone]:
    """Return a node's populated zones, highest first, and let the policy zone rise."""
    out = []
    for zone in reversed(pgdat.zones):
        if zone.populated:
            out.append(zone)
            if m.policy_zone < zone.zone_idx != ZONE_MOVABLE:
                m.policy_zone = zone.zone_idx
    return out


@traced
def build_zonelists(m: Machine, pgdat: PgData) -> None:
    """Build one node's fallback list and its own-node list; log the order."""
    pgdat.order_from = (frozenset(m.n_memory), dict(m.node_load))
    order: list[int] = []
    used: set[int] = set()
    prev = pgdat.node_id
    while (n := find_next_best_node(m, pgdat.node_id, used)) is not None:
        # Equidistant nodes take turns in being somebody's first fallback.
        if m.node_distance(pgdat.node_id, n) != m.node_distance(pgdat.node_id, prev):
            m.node_load[n] = m.node_load.get(n, 0) + 1
        order.append(n)
        prev = n
    pgdat.zonelist = [z for n in order for z in build_zonerefs_node(m, m.nodes[n])]
    pgdat.nofallback = build_zonerefs_node(m, pgdat)
    pgdat.fallback_order = order
    m.memmap_engine.set_zonelists(
        pgdat.node_id, [z.index for z in pgdat.zonelist], [z.index for z in pgdat.nofallback]
    )
    m.printk(f"Fallback order for Node {pgdat.node_id}: " + "".join(f"{n} " for n in order))


@traced
def __build_all_zonelists(m: Machine, pgdat: PgData | None) -> None:
    """Build the lists of one node that is about to come, or of every possible node."""
    m.node_load = {}
    if pgdat is not None and pgdat.node_id not in m.n_online:
        build_zonelists(m, pgdat)
        return
    for nid in sorted(m.nodes):
        build_zonelists(m, m.nodes[nid])


def nr_free_zone_pages(m: Machine, highest: int) -> int:
    """Return pages above the high watermarks in zones up to an index, as the boot CPU sees them."""
    return _watermarks.free_zone_pages(m.memmap_engine, m.this_node(), highest)


@traced
def build_all_zonelists(m: Machine, pgdat: PgData | None = None) -> None:
    """Rebuild zonelists and decide whether pages are grouped by mobility.

    :param pgdat: a node that is not online yet (only its lists are built), or None for all.
    """
    __build_all_zonelists(m, pgdat)
    m.vm_total_pages = nr_free_zone_pages(m, ZONE_MOVABLE)
    m.memmap_engine.grouping_disabled = m.vm_total_pages < PAGEBLOCK_NR_PAGES * MIGRATE_TYPES
    off = "off" if m.memmap_engine.grouping_disabled else "on"
    m.printk(
        f"Built {len(m.n_online)} zonelists, mobility grouping {off}.  "
        f"Total pages: {m.vm_total_pages}"
    )
    m.printk(f"Policy zone: {ZONE_NAMES[m.policy_zone]}")


def nr_free_pagecache_pages(m: Machine) -> int:
    """Return the total that build_all_zonelists logs, as it would be now (an older name)."""
    return nr_free_zone_pages(m, ZONE_MOVABLE)


# The variable of older kernels that was set to it; Machine.vm_total_pages is what was logged.
vm_total_pages = nr_free_pagecache_pages
