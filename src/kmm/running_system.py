"""What the tasks of a live system do to memory that arrives, between two operations.

A recorded system is never idle: each CPU's tasks take memory from the zone nearest to it.  Of
that, only what follows from the zonelists is modelled.  A kernel zone that serves a CPU holds
slabs as soon as its first block is online, so that this block never goes offline again; a
Movable zone that does has pages on that CPU's list.  A Machine by itself is idle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kmm.errors import OutOfMemory
from kmm.mmzone import Zone
from kmm.page_alloc import (
    __GFP_DIRECT_RECLAIM,
    __GFP_NOWARN,
    GFP_HIGHUSER_MOVABLE,
    GFP_NOWAIT,
    __alloc_pages,
    __free_pages,
)
from kmm.params import ZONE_MOVABLE, ZONE_NORMAL

if TYPE_CHECKING:
    from kmm.machine import Machine

# Nothing here waits for memory: a task that finds none near goes elsewhere.
_SLAB = GFP_NOWAIT | __GFP_NOWARN
_USER = GFP_HIGHUSER_MOVABLE & ~__GFP_DIRECT_RECLAIM | __GFP_NOWARN


class RunningSystem:
    """The tasks of one machine, and which kernel zones hold their slabs.

    :param m: the machine; its populated zones hold slabs as far as their counts say.
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
            if (
                kernel is not None
                and kernel.index not in self._with_slabs
                and _use(m, kernel, _SLAB, nid, cpus[0], keep=True)
            ):
                self._with_slabs.add(kernel.index)
            first = zonelist[0]
            if first.zone_idx == ZONE_MOVABLE and first.nr_free_pages == first.managed_pages:
                # The task ends; what its first page brought to the CPU's list stays there.
                _use(m, first, _USER, nid, cpus[0], keep=False)


def _use(m: Machine, zone: Zone, gfp: int, nid: int, cpu: int, keep: bool) -> bool:
    """Let a CPU's task take a page, and keep it if it came from the zone; whether it did."""
    try:
        pfn = __alloc_pages(m, gfp, 0, nid, cpu=cpu)
    except OutOfMemory:
        return False
    came = m.page_zone(pfn) is zone
    if not (came and keep):
        __free_pages(m, pfn, 0, cpu)
    return came
