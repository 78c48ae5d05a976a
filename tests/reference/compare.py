"""Compares a machine with its twin: counters, and every list with its order."""

from __future__ import annotations

from typing import Any

from kmm import Machine
from kmm.mmzone import Zone
from tests.reference.hotplug_twin import TwinMachine
from tests.reference.zone_twin import TwinZone


def assert_same(m: Machine, twin: TwinMachine) -> None:
    """Stop at the first difference."""
    for zone, mine in zip(m.all_zones(), twin.zones, strict=True):
        if mine.spanned or zone.spanned_pages:
            _same_zone(m, zone, mine)
    for nid, node in enumerate(twin.nodes):
        assert m.memmap_engine.kswapd_state(nid) == node.kswapd, nid
        order = [z.index for z in m.nodes[nid].zonelist]
        assert order == [5 * z.nid + z.idx for z in node.fallback]
    assert m.vm.min_free_kbytes == twin.vm.min_free_kbytes
    assert m.memmap_engine.grouping_disabled == twin.pages.grouping_disabled


def _same_zone(m: Machine, zone: Zone, mine: TwinZone) -> None:
    where = (mine.nid, mine.idx)
    for (order, mt), pfns in mine.free.items():
        assert zone.free_list(order, mt) == pfns, (where, order, mt)
    for cpu, pcp in enumerate(mine.pcps):
        state = (pcp.count, pcp.high, pcp.batch, pcp.factor)
        assert zone.pcp_state(cpu) == state, (where, cpu)
        for index, pages in enumerate(pcp.lists):
            assert zone.pcp_list(cpu, index) == [p for p, _ in pages], (where, cpu, index)
    for block, mt in mine.types.items():
        assert m.memmap_engine.get_pageblock_migratetype(block) == mt, (where, block)
    assert counters(zone) == twin_counters(mine), where


def counters(zone: Zone) -> dict[str, Any]:
    return {
        "free": zone.nr_free_pages,
        "isolated": zone.nr_isolate_pageblock,
        "highatomic": zone.nr_reserved_highatomic,
        "span": (zone.zone_start_pfn, zone.spanned_pages),
        "pages": (zone.present_pages, zone.managed_pages),
        "marks": (zone.watermark_min, zone.watermark_low, zone.watermark_high),
        "boost": zone.watermark_boost,
        "reserve": zone.lowmem_reserve,
        "pageset": (zone.pageset_high, zone.pageset_batch),
        "threshold": zone.stat_threshold,
        "events": zone.vm_events,
    }


def twin_counters(zone: TwinZone) -> dict[str, Any]:
    return {
        "free": zone.nr_free_pages,
        "isolated": zone.nr_isolate,
        "highatomic": zone.nr_reserved_highatomic,
        "span": (zone.start, zone.spanned),
        "pages": (zone.present, zone.managed),
        "marks": (zone.wmark_min, zone.wmark_low, zone.wmark_high),
        "boost": zone.boost,
        "reserve": tuple(zone.reserve),
        "pageset": (zone.pageset_high, zone.pageset_batch),
        "threshold": zone.threshold,
        "events": zone.events,
    }
