"""What the tasks of a live system do to memory that arrives, between two operations.

A recorded system is never idle: each CPU's tasks take memory from the zone nearest to it.  Of
that, only what follows from the zonelists is modelled.  A kernel zone that serves a CPU holds
slabs as soon as its first block is online, so that this block never goes offline again; a
Movable zone that does has pages on that CPU's list.  A Machine by itself is idle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kmm.mmzone import Zone
from kmm.page_alloc import ALLOC_KSWAPD, __free_pages, zone_watermark_ok
from kmm.params import MIGRATE_MOVABLE, MIGRATE_UNMOVABLE, ZONE_MOVABLE, ZONE_NORMAL

if TYPE_CHECKING:
    from kmm.machine import Machine


class RunningSystem:
    """The tasks of one machine, and which kernel zones hold their slabs.

    :param m: the machine; its zones hold slabs as far as their boot counts say.
    """

    def __init__(self, m: Machine) -> None:
        self._m = m
        self._with_slabs = {zone.index for zone in m.all_zones() if zone.populated}

    def run(self) -> None:
        """Let the tasks of every CPU allocate as they do after an operation."""
        m = self._m
        self._with_slabs -= {zone.index for zone in m.all_zones() if not zone.populated}
        for nid in sorted(m.n_online):
            zonelist, cpus = m.nodes[nid].zonelist, m.cpus_of_node(nid)
            if not zonelist or not cpus:
                continue
            kernel = next((z for z in zonelist if z.zone_idx <= ZONE_NORMAL), None)
            if kernel is not None and kernel.index not in self._with_slabs:
                self._take_slab(kernel, cpus[0])
            if zonelist[0].zone_idx == ZONE_MOVABLE:
                _use_movable(m, zonelist[0], cpus[0])

    def _take_slab(self, zone: Zone, cpu: int) -> None:
        # Below its mark the next zone serves; this one gets slabs once there is room.
        if zone_watermark_ok(zone, 0, zone.low_wmark_pages(), ZONE_NORMAL, 0):
            zone.rmqueue(0, MIGRATE_UNMOVABLE, ALLOC_KSWAPD, cpu)
            self._with_slabs.add(zone.index)


def _use_movable(m: Machine, zone: Zone, cpu: int) -> None:
    """Let a task come and go: what its first page brought to the CPU's list stays there."""
    quiet = zone.nr_free_pages == zone.managed_pages
    if quiet and zone_watermark_ok(zone, 0, zone.low_wmark_pages(), ZONE_MOVABLE, 0):
        pfn = zone.rmqueue(0, MIGRATE_MOVABLE, ALLOC_KSWAPD, cpu)
        __free_pages(m, pfn, 0)
