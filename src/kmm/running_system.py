"""What the tasks of a live system do to memory that arrives, between two operations.

A recorded system is never idle: each CPU's tasks take memory from the zone nearest to it.  Of
that, only what follows from the zonelists is modelled.  A kernel zone that serves a CPU holds
slabs as soon as its first block is online, so that this block never goes offline again; a
Movable zone that does has pages on that CPU's list.  And time passes between two operations, in
which CPUs give back what they keep of other nodes' pages.  A Machine by itself is idle.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kmm.errors import OutOfMemory
from kmm.load import load_pages
from kmm.mmzone import Zone
from kmm.page_alloc import (
    __GFP_DIRECT_RECLAIM,
    __GFP_NOWARN,
    GFP_HIGHUSER_MOVABLE,
    GFP_NOWAIT,
    __alloc_pages,
    __free_pages,
)
from kmm.params import USER_ANON, ZONE_MOVABLE, ZONE_NORMAL

if TYPE_CHECKING:
    from kmm.machine import Machine

# Seconds.  The counters' worker looks at a CPU's lists every second, and finds at its third look
# that nothing has changed; the rest is what a recording takes in the guest, about.
_UNTOUCHED, _AGAIN = 2.7, 3.0
_SETTLE, _SNAPSHOT = 0.9, 1.5
_FAULT, _UNMAP = 100e-6, 20e-6

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


class RemotePagesets:
    """What CPUs keep on their lists of other nodes' zones, and since when (refresh_cpu_vm_stats).

    A CPU that has left such a list alone for some seconds gives a batch of it back, if it has
    counted something of the zone meanwhile, as it does for pages of LRU lists.  Batches on their
    way to and from the free lists are mostly larger than what it counts by itself.

    :param m: the machine.
    """

    def __init__(self, m: Machine) -> None:
        self._m = m
        self._counts: dict[tuple[int, int], int] = {}
        self._idle: dict[tuple[int, int], float] = {}
        self._used = _pages_of_tasks(m)
        self._stats: dict[int, tuple[int, ...]] = {}
        self.look()
        self._idle.clear()

    def _lists(self) -> list[tuple[Zone, int, int]]:
        """The lists that have pages: zone, CPU, pages."""
        m, out = self._m, []
        for zone in m.all_zones():
            if not zone.populated or not zone.pcp_pages():
                continue
            for cpu in range(m.nr_cpus):
                count = zone.pcp_state(cpu)[0]
                if count and zone.nid != m.node_of_cpu(cpu):
                    out.append((zone, cpu, count))
        return out

    def look(self, still: float = 0.0) -> None:
        """Note which lists an operation has changed: their time begins anew.

        :param still: seconds that whoever did it goes on.
        """
        stats = {zone.index: tuple(zone.stat()) for zone in self._m.all_zones() if zone.populated}
        counts, idle = {}, {}
        for zone, cpu, count in self._lists():
            key = zone.index, cpu
            counts[key] = count
            counted = stats[zone.index] != self._stats.get(zone.index)
            if counted and count != self._counts.get(key):
                idle[key] = -still
            elif key in self._idle:
                idle[key] = self._idle[key]
        self._counts, self._idle, self._stats = counts, idle, stats

    def after_load(self, load: Mapping[str, Any]) -> None:
        """Note what a program has used; one in the background is at it while its line goes on."""
        before, self._used = self._used, _pages_of_tasks(self._m)
        still = 0.0
        if load["kind"] == "anon":
            came = load_pages(load) if not load.get("free") else 0
            still = came * _FAULT + max(0, before - self._used) * _UNMAP
        self.look(still)

    def wait(self, seconds: float) -> None:
        """Let time pass in which no task uses these lists."""
        # The worker comes by as often as vm.stat_interval says.
        seconds /= max(1, self._m.vm.kept.get("stat_interval", 1))
        for zone, cpu, count in self._lists():
            key = zone.index, cpu
            if key not in self._idle:
                continue
            idle = self._idle.pop(key) + seconds
            while idle >= _UNTOUCHED and count:
                drained = min(count, zone.pcp_state(cpu)[2])
                zone.drain(cpu, drained)
                count = zone.pcp_state(cpu)[0]
                idle -= _AGAIN
                if drained > zone.stat_threshold:
                    break  # counted at once, so that the worker sees nothing new
            else:
                self._idle[key] = idle
            self._counts[key] = count

    def settle(self) -> None:
        """Let the time pass from the end of an operation to when the recording looks.

        A program in the background has said by then that it is ready.
        """
        self.look()
        self._idle = {key: max(idle, 0.0) for key, idle in self._idle.items()}
        self.wait(_SETTLE)

    def wait_for_snapshot(self) -> None:
        """Let the time pass that the recording takes to look."""
        self.wait(_SNAPSHOT)


def _pages_of_tasks(m: Machine) -> int:
    return sum(user.nr_present for user in m.users.values() if user.kind == USER_ANON)
