"""Counters of zones, nodes and the whole machine, and the files that show them (mm/vmstat.c).

What a machine began with is in the ``vmstat`` of zones and nodes and in
``Machine.vm_event_states``; the engine counts what has changed since.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from kmm import _compaction
from kmm.errors import ConfigError, shown
from kmm.mmzone import PgData, Zone
from kmm.params import MAX_ORDER, PAGEBLOCK_NR_PAGES, ZONE_NAMES
from kmm.watermarks import global_dirty_limits

if TYPE_CHECKING:
    from kmm.machine import Machine

PATH = "/proc/vmstat"

NODE_STAT_ITEMS = tuple(
    """nr_inactive_anon nr_active_anon nr_inactive_file nr_active_file nr_unevictable
    nr_slab_reclaimable nr_slab_unreclaimable nr_isolated_anon nr_isolated_file workingset_nodes
    workingset_refault_anon workingset_refault_file workingset_activate_anon
    workingset_activate_file workingset_restore_anon workingset_restore_file
    workingset_nodereclaim nr_anon_pages nr_mapped nr_file_pages nr_dirty nr_writeback
    nr_writeback_temp nr_shmem nr_shmem_hugepages nr_shmem_pmdmapped nr_file_hugepages
    nr_file_pmdmapped nr_anon_transparent_hugepages nr_vmscan_write nr_vmscan_immediate_reclaim
    nr_dirtied nr_written nr_throttled_written nr_kernel_misc_reclaimable nr_foll_pin_acquired
    nr_foll_pin_released nr_kernel_stack nr_page_table_pages nr_sec_page_table_pages
    nr_swapcached pgpromote_success pgpromote_candidate""".split()
)
#: The items of a zone behind nr_free_pages.
ZONE_STAT_ITEMS = tuple(
    """nr_zone_inactive_anon nr_zone_active_anon nr_zone_inactive_file nr_zone_active_file
    nr_zone_unevictable nr_zone_write_pending nr_mlock nr_bounce nr_zspages nr_free_cma""".split()
)
NUMA_STAT_ITEMS = tuple(
    "numa_hit numa_miss numa_foreign numa_interleave numa_local numa_other".split()
)
#: Those of them that numastat calls otherwise.
NUMASTAT_NAMES = {
    "numa_interleave": "interleave_hit",
    "numa_local": "local_node",
    "numa_other": "other_node",
}
#: Those of them that the engine counts.
ENGINE_NUMA_ITEMS = frozenset(NUMA_STAT_ITEMS) - {"numa_interleave"}
VM_EVENT_ITEMS = tuple(
    """pgpgin pgpgout pswpin pswpout pgalloc_dma pgalloc_dma32 pgalloc_normal pgalloc_movable
    pgalloc_device allocstall_dma allocstall_dma32 allocstall_normal allocstall_movable
    allocstall_device pgskip_dma pgskip_dma32 pgskip_normal pgskip_movable pgskip_device
    pgfree pgactivate pgdeactivate pglazyfree pgfault pgmajfault pglazyfreed pgrefill pgreuse
    pgsteal_kswapd pgsteal_direct pgdemote_kswapd pgdemote_direct pgscan_kswapd pgscan_direct
    pgscan_direct_throttle pgscan_anon pgscan_file pgsteal_anon pgsteal_file
    zone_reclaim_failed pginodesteal slabs_scanned kswapd_inodesteal
    kswapd_low_wmark_hit_quickly kswapd_high_wmark_hit_quickly pageoutrun pgrotated
    drop_pagecache drop_slab oom_kill numa_pte_updates numa_huge_pte_updates numa_hint_faults
    numa_hint_faults_local numa_pages_migrated pgmigrate_success pgmigrate_fail
    thp_migration_success thp_migration_fail thp_migration_split compact_migrate_scanned
    compact_free_scanned compact_isolated compact_stall compact_fail compact_success
    compact_daemon_wake compact_daemon_migrate_scanned compact_daemon_free_scanned
    htlb_buddy_alloc_success htlb_buddy_alloc_fail unevictable_pgs_culled
    unevictable_pgs_scanned unevictable_pgs_rescued unevictable_pgs_mlocked
    unevictable_pgs_munlocked unevictable_pgs_cleared unevictable_pgs_stranded thp_fault_alloc
    thp_fault_fallback thp_fault_fallback_charge thp_collapse_alloc thp_collapse_alloc_failed
    thp_file_alloc thp_file_fallback thp_file_fallback_charge thp_file_mapped thp_split_page
    thp_split_page_failed thp_deferred_split_page thp_split_pmd thp_scan_exceed_none_pte
    thp_scan_exceed_swap_pte thp_scan_exceed_share_pte thp_split_pud thp_zero_page_alloc
    thp_zero_page_alloc_failed thp_swpout thp_swpout_fallback balloon_inflate balloon_deflate
    balloon_migrate swap_ra swap_ra_hit ksm_swpin_copy cow_ksm zswpin zswpout
    direct_map_level2_splits direct_map_level3_splits""".split()
)

_COUNTER_MAX = (1 << 63) - 1
_UNSIGNED = (1 << 64) - 1


def count_numa_events(zone: Zone, on: bool) -> None:
    """Let a zone count numa items or not (sysctl_vm_numa_stat_handler); they begin with 0 anew.

    :param on: whether they are counted; nothing happens to who counts them already.
    """
    if on and not zone.numa_stat_off:
        return
    zone.numa_stat_off = not on
    zone.vm_events = dict.fromkeys(ENGINE_NUMA_ITEMS, 0)
    zone.vmstat.pop("numa_interleave", None)


def zone_numa_events(zone: Zone) -> dict[str, int]:
    """Return a zone's numa items in the kernel's order, counted in requests."""
    if zone.numa_stat_off:
        return dict.fromkeys(NUMA_STAT_ITEMS, 0)
    counted = zone.vm_events
    return {
        k: (counted[k] if k in ENGINE_NUMA_ITEMS else zone.vmstat.get(k, 0)) & _UNSIGNED
        for k in NUMA_STAT_ITEMS
    }


# Shown in huge pages, counted in pages.
_HUGE_ITEMS = frozenset(
    """nr_shmem_hugepages nr_shmem_pmdmapped nr_file_hugepages nr_file_pmdmapped
    nr_anon_transparent_hugepages""".split()
)


def zone_items(zone: Zone) -> dict[str, int]:
    """Return a zone's items of ZONE_STAT_ITEMS: what it began with, and what was counted since."""
    counted = zone.stat()
    return {
        k: max(0, zone.vmstat.get(k, 0) + n) for k, n in zip(ZONE_STAT_ITEMS, counted, strict=True)
    }


def node_items(m: Machine, pgdat: PgData) -> dict[str, int]:
    """Return a node's items of NODE_STAT_ITEMS, in the units in which they are shown."""
    counted = m.memmap_engine.node_stat(pgdat.node_id)
    out = {}
    for k, n in zip(NODE_STAT_ITEMS, counted, strict=True):
        n = n // PAGEBLOCK_NR_PAGES if k in _HUGE_ITEMS else n
        out[k] = max(0, pgdat.vmstat.get(k, 0) + n)
    return out


def sum_zone_items(zones: list[Zone]) -> dict[str, int]:
    """Return the items of some zones added up: nr_free_pages, the other pages, numa items."""
    sums = {"nr_free_pages": sum(z.nr_free_pages for z in zones)}
    for k in ZONE_STAT_ITEMS:
        sums[k] = 0
    for zone in zones:
        for k, n in zone_items(zone).items():
            sums[k] += n
    numa = [zone_numa_events(z) for z in zones]
    return sums | {k: sum(n[k] for n in numa) & _UNSIGNED for k in NUMA_STAT_ITEMS}


def node_stat(m: Machine, name: str) -> int:
    """Return a node statistic summed over the machine."""
    return sum(node_items(m, p)[name] for p in m.nodes.values())


def all_node_items(m: Machine) -> dict[str, int]:
    """Return the items of all nodes added up."""
    sums = dict.fromkeys(NODE_STAT_ITEMS, 0)
    for pgdat in m.nodes.values():
        for k, n in node_items(m, pgdat).items():
            sums[k] += n
    return sums


def all_vm_events(m: Machine) -> dict[str, int]:
    """Return how often each event happened, in the order of /proc/vmstat; pg* count pages."""
    counted = m.memmap_engine.vm_events()
    counts = {
        k: m.vm_event_states.get(k, 0) + n for k, n in zip(VM_EVENT_ITEMS, counted, strict=True)
    }
    for zone in m.all_zones():
        events = zone.vm_events
        counts[f"pgalloc_{ZONE_NAMES[zone.zone_idx].lower()}"] += events["pgalloc"]
        counts["pgfree"] += events["pgfree"]
    return {k: n & _UNSIGNED for k, n in counts.items()}


def _lines(rows: Mapping[str, int]) -> str:
    return "".join(f"{k} {n}\n" for k, n in rows.items())


def vmstat(m: Machine) -> str:
    """/proc/vmstat."""
    rows = sum_zone_items(m.all_zones())
    rows |= all_node_items(m)
    background, dirty = global_dirty_limits(m)
    rows |= {"nr_dirty_threshold": dirty, "nr_dirty_background_threshold": background}
    # The last line is for programs that look for it; the counter is gone.
    return _lines(rows | all_vm_events(m) | {"nr_unstable": 0})


def node_vmstat(m: Machine, pgdat: PgData) -> str:
    """/sys/devices/system/node/nodeN/vmstat."""
    rows = sum_zone_items(pgdat.zones)
    return _lines(rows | node_items(m, pgdat))


def node_numastat(m: Machine, pgdat: PgData) -> str:
    """/sys/devices/system/node/nodeN/numastat."""
    sums = sum_zone_items(pgdat.zones)
    return _lines({NUMASTAT_NAMES.get(k, k): sums[k] for k in NUMA_STAT_ITEMS})


def _count(path: str, name: str, value: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) < 20) or int(value) > _COUNTER_MAX:
        raise ConfigError(
            f"{path}: {name} {shown(value)}; allowed: a number from 0 to {_COUNTER_MAX}"
        )
    return int(value)


def _counts(path: str, text: str, names: Collection[str]) -> dict[str, int]:
    rows = (line.partition(" ") for line in text.splitlines())
    return {name: _count(path, name, value) for name, _, value in rows if name in names}


def load_vm_events(m: Machine, text: str) -> None:
    """Let events count on from what a /proc/vmstat shows.

    :raises ConfigError: naming an event whose count is none.
    """
    m.vm_event_states.update(_counts(PATH, text, VM_EVENT_ITEMS))


def load_numa_events(m: Machine, files: Mapping[str, str]) -> None:
    """Let zones without pages, which zoneinfo does not show, keep what was counted in them.

    :param files: path to text; a node's numastat tells of its zones, /proc/vmstat of offline nodes.
    :raises ConfigError: naming a count that is none.
    """
    for nid, pgdat in m.nodes.items():
        path = f"/sys/devices/system/node/node{nid}/numastat"
        names = {NUMASTAT_NAMES.get(k, k): k for k in NUMA_STAT_ITEMS}
        want = _counts(path, files.get(path, ""), names)
        _keep_rest(pgdat, {names[k]: n for k, n in want.items()}, sum_zone_items(pgdat.zones))
    want = _counts(PATH, files.get(PATH, ""), NUMA_STAT_ITEMS)
    offline = next((p for nid, p in m.nodes.items() if nid not in m.n_online), None)
    if offline is not None:
        _keep_rest(offline, want, sum_zone_items(m.all_zones()))


def _keep_rest(pgdat: PgData, want: Mapping[str, int], have: Mapping[str, int]) -> None:
    """Count in a node's last zone, which never has pages, what its other zones do not."""
    for k, n in want.items():
        if n <= have[k]:
            continue
        if k in ENGINE_NUMA_ITEMS:
            pgdat.zones[-1].vm_events = {k: n - have[k]}
        else:
            pgdat.zones[-1].vmstat[k] = n - have[k]


# -- remote per-CPU lists -----------------------------------------------------------------

# A pass of a CPU's worker that finds counters changed gives the zone's list so many passes.
_EXPIRE = 3
# How long after a change the next pass comes, in parts of the interval.  In a kernel that is
# chance, anything up to 1; here it is always the same.
_PHASE = 0.7


class PagesetWorker:
    """Gives back what CPUs keep on their lists of other nodes' zones (refresh_cpu_vm_stats).

    A CPU that has left such a list alone for some seconds gives a batch of it back, if it has
    counted something of the zone meanwhile, as it does for pages of LRU lists.  Batches on their
    way to and from the free lists are mostly larger than what it counts by itself.

    :param m: the machine.
    """

    def __init__(self, m: Machine) -> None:
        self.m = m
        #: By zone and CPU: seconds since the list was changed.
        self.idle: dict[tuple[int, int], float] = {}
        self._counts: dict[tuple[int, int], int] = {}
        self._stats: dict[int, tuple[int, ...]] = {}
        self.look()
        self.idle.clear()

    def _lists(self) -> list[tuple[Zone, int, int]]:
        """The lists that have pages: zone, CPU, pages."""
        m, out = self.m, []
        for zone in m.all_zones():
            if not zone.populated or not zone.pcp_pages():
                continue
            for cpu in range(m.nr_cpus):
                count = zone.pcp_state(cpu)[0]
                if count and zone.nid != m.node_of_cpu(cpu):
                    out.append((zone, cpu, count))
        return out

    def look(self, still: float = 0.0) -> None:
        """Note which lists were changed: their time begins anew.

        :param still: seconds that whoever changed them goes on.
        """
        stats = {zone.index: tuple(zone.stat()) for zone in self.m.all_zones() if zone.populated}
        counts, idle = {}, {}
        for zone, cpu, count in self._lists():
            key = zone.index, cpu
            counts[key] = count
            counted = stats[zone.index] != self._stats.get(zone.index)
            if counted and count != self._counts.get(key):
                idle[key] = -still
            elif key in self.idle:
                idle[key] = self.idle[key]
        self._counts, self.idle, self._stats = counts, idle, stats

    def wait(self, seconds: float) -> None:
        """Let time pass in which no task uses these lists."""
        # The worker comes by as often as vm.stat_interval says.
        seconds /= max(1, self.m.vm.kept.get("stat_interval", 1))
        for zone, cpu, count in self._lists():
            key = zone.index, cpu
            if key not in self.idle:
                continue
            idle = self.idle.pop(key) + seconds
            while idle >= _PHASE + _EXPIRE - 1 and count:
                drained = min(count, zone.pcp_state(cpu)[2])
                zone.drain(cpu, drained)
                count = zone.pcp_state(cpu)[0]
                idle -= _EXPIRE  # draining has changed a counter, too
                if drained > zone.stat_threshold:
                    break  # counted at once, so that the worker sees nothing new
            else:
                self.idle[key] = idle
            self._counts[key] = count


# -- debugfs: extfrag -------------------------------------------------------------------


def _per_order(m: Machine, nodes: set[int], show: Callable[[Zone, int], str]) -> str:
    return "".join(
        f"Node {zone.nid}, zone {zone.name:>8} "
        + "".join(f"{show(zone, order)} " for order in range(MAX_ORDER))
        + "\n"
        for nid in sorted(nodes)
        for zone in m.nodes[nid].zones
        if zone.populated
    )


def unusable_index(m: Machine) -> str:
    """/sys/kernel/debug/extfrag/unusable_index: of free memory, what is in blocks too small."""

    def show(zone: Zone, order: int) -> str:
        index = _compaction.unusable_free_index(zone, order)
        return f"{index // 1000}.{index % 1000:03}"

    return _per_order(m, m.n_memory & m.n_online, show)


def extfrag_index(m: Machine) -> str:
    """/sys/kernel/debug/extfrag/extfrag_index: what a request fails for, of fragmentation."""

    def show(zone: Zone, order: int) -> str:
        index = _compaction.fragmentation_index(zone, order)
        # C cuts toward zero, and the sign of each part shows.
        rest = abs(index) % 1000
        return f"{int(index / 1000):2}." + (f"-{rest:03}" if index < 0 < rest else f"{rest:03}")

    return _per_order(m, m.n_online, show)
