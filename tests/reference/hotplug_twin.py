"""A slow, readable twin of what onlining and offlining do to the allocator, and of zonelists."""

from __future__ import annotations

from kmm import Machine
from tests.reference.allocator_twin import TwinAllocator
from tests.reference.free_area_twin import ISOLATE, MOVABLE, PAGEBLOCK
from tests.reference.watermark_twin import (
    MOVABLE_ZONE,
    init_per_zone_wmark_min,
    pages_above_high,
    set_pageset,
)
from tests.reference.zone_twin import TwinZone

SECTION = 32768


class TwinMachine(TwinAllocator):
    """An allocator whose memory blocks come and go.

    :param distances: between nodes, as in the SLIT.
    """

    def __init__(self, nr_nodes: int, cpus: list[int], distances: list[list[int]]) -> None:
        super().__init__(nr_nodes, cpus)
        self.distances = distances
        self.n_memory: set[int] = set()
        self.block_zone: dict[int, TwinZone] = {}  # first pfn of an online block -> its zone

    # -- zonelists ------------------------------------------------------------------------

    def build_zonelists(self) -> None:
        load = [0] * len(self.nodes)
        for nid in range(len(self.nodes)):
            order, before = [nid], nid
            while left := self.n_memory - set(order):
                best = min(left, key=lambda n: (self._remoteness(nid, n) * 1024 + load[n], n))
                if self.distances[nid][best] != self.distances[nid][before]:
                    load[best] += 1
                order.append(best)
                before = best
            self.nodes[nid].nofallback = self._populated(nid)
            self.nodes[nid].fallback = [z for n in order for z in self._populated(n)]
        self.pages.grouping_disabled = pages_above_high(self, MOVABLE_ZONE) < 5 * PAGEBLOCK

    def _remoteness(self, nid: int, n: int) -> int:
        return self.distances[nid][n] + (n < nid) + (self.cpus_of_node[n] > 0)

    def _populated(self, nid: int) -> list[TwinZone]:
        return [z for z in reversed(self.zones_of(nid)) if z.present]

    # -- blocks ---------------------------------------------------------------------------

    def online(self, first: int, zone: TwinZone) -> None:
        end = first + SECTION
        self._span(zone, min(first, zone.start) if zone.spanned else first, end)
        fresh = not zone.present
        for block in range(first, end, PAGEBLOCK):
            self.pages.zone_of[block] = zone
            zone.types[block] = ISOLATE
        zone.nr_isolate += SECTION // PAGEBLOCK
        if fresh:
            zone.pcp_reset()
            set_pageset(self, zone)
        for pfn in range(first, end, 1024):
            zone.managed += 1024
            zone.events["pgfree"] += 1024
            zone.free_one_page(pfn, 10, ISOLATE, to_tail=True)
        zone.present += SECTION
        self.n_memory.add(zone.nid)
        if fresh:
            self.build_zonelists()
        zone.undo_isolate(first, end, MOVABLE)
        init_per_zone_wmark_min(self)
        self.block_zone[first] = zone

    @staticmethod
    def _span(zone: TwinZone, start: int, end: int) -> None:
        end = max(end, zone.start + zone.spanned)
        zone.start, zone.spanned = start, end - start

    def offline(self, first: int) -> bool:
        """Whether the block went; if not, its pageblocks are Movable and nothing is cached."""
        zone, end = self.block_zone[first], first + SECTION
        zone.pcp_disable()
        done = zone.isolate(first, end) is None
        if done and any(first <= p < end for p in self.pages.used):
            zone.undo_isolate(first, end, MOVABLE)
            done = False
        if done:
            self._unlink(zone, first, end)
        zone.pcp_enable()
        if done:
            self._forget(zone, first)
        return done

    def _unlink(self, zone: TwinZone, first: int, end: int) -> None:
        for pfn in sorted(p for p in zone.where if first <= p < end):
            zone.remove(pfn)
        for block in range(first, end, PAGEBLOCK):
            del zone.types[block], self.pages.zone_of[block]
        zone.nr_isolate -= SECTION // PAGEBLOCK
        del self.block_zone[first]

    def _forget(self, zone: TwinZone, first: int) -> None:
        zone.managed -= SECTION
        zone.present -= SECTION
        init_per_zone_wmark_min(self)
        if not zone.present:
            zone.pcp_reset()
            self.build_zonelists()
        if not any(z.present for z in self.zones_of(zone.nid)):
            self.n_memory.discard(zone.nid)
        mine = sorted(b for b, z in self.block_zone.items() if z is zone)
        # Only an end of the span that left moves it.
        start, end = zone.start, zone.start + zone.spanned
        if not mine:
            start = end = 0
        elif first == start:
            start = mine[0]
        elif first + SECTION == end:
            end = mine[-1] + SECTION
        zone.start, zone.spanned = start, end - start

    # -- a machine that has booted ----------------------------------------------------------

    @classmethod
    def of(cls, m: Machine) -> TwinMachine:
        """Take over the state of a machine after boot: how boot made it is not the twin's rule."""
        nids = range(len(m.nodes))
        cpus = [next(n for n in nids if cpu in m.cpus_of_node(n)) for cpu in range(m.nr_cpus)]
        distances = [[m.node_distance(a, b) for b in nids] for a in nids]
        twin = cls(len(m.nodes), cpus, distances)
        twin.n_online, twin.n_memory = set(m.n_online), set(m.n_memory)
        vm = twin.vm
        vm.min_free_kbytes = m.vm.min_free_kbytes
        vm.user_min_free_kbytes = m.vm.user_min_free_kbytes
        vm.huge_pages = m.vm.thp_available and m.vm.thp_enabled != "never"
        for mine, zone in zip(twin.zones, m.all_zones(), strict=True):
            mine.start, mine.spanned = zone.zone_start_pfn, zone.spanned_pages
            mine.present, mine.managed = zone.present_pages, zone.managed_pages
            mine.nr_free_pages = zone.nr_free_pages
            mine.wmark_min, mine.wmark_low = zone.watermark_min, zone.watermark_low
            mine.wmark_high, mine.boost = zone.watermark_high, zone.watermark_boost
            mine.reserve = list(zone.lowmem_reserve)
            mine.pageset_high, mine.pageset_batch = zone.pageset_high, zone.pageset_batch
            mine.threshold = zone.stat_threshold
            mine.events.update(zone.vm_events)
            for order, mt in mine.free:
                for pfn in zone.free_list(order, mt):
                    mine.insert(pfn, order, mt, tail=True)
            for cpu, pcp in enumerate(mine.pcps):
                pcp.count, pcp.high, pcp.batch, pcp.factor = zone.pcp_state(cpu)
                for index, lst in enumerate(pcp.lists):
                    mt = (0, 1)[index - 12] if index >= 12 else index % 3
                    lst.extend((pfn, mt) for pfn in zone.pcp_list(cpu, index))
            if mine.spanned:
                first, end = mine.start // PAGEBLOCK * PAGEBLOCK, mine.start + mine.spanned
                for block in range(first, end, PAGEBLOCK):
                    if m.page_zone(block) is zone:
                        mine.types[block] = m.memmap_engine.get_pageblock_migratetype(block)
                        twin.pages.zone_of[block] = mine
        for nid, node in enumerate(twin.nodes):
            node.kswapd = m.memmap_engine.kswapd_state(nid)
        twin.build_zonelists()
        twin.pages.grouping_disabled = m.memmap_engine.grouping_disabled
        return twin
