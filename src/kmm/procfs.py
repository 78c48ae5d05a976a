"""The texts of /proc that show memory (mm/vmstat.c, fs/proc)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from kmm.mmzone import PgData, Zone
from kmm.params import (
    MAX_ORDER,
    MIGRATE_TYPES,
    MIGRATETYPE_NAMES,
    PAGEBLOCK_NR_PAGES,
    PAGES_PER_SECTION,
)
from kmm.resource import iomem_show

if TYPE_CHECKING:
    from kmm.machine import Machine

KPAGEFLAGS_CHUNK = 1 << 20

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
ZONE_STAT_ITEMS = tuple(
    """nr_zone_inactive_anon nr_zone_active_anon nr_zone_inactive_file nr_zone_active_file
    nr_zone_unevictable nr_zone_write_pending nr_mlock nr_bounce nr_zspages nr_free_cma""".split()
)
NUMA_STAT_ITEMS = tuple(
    "numa_hit numa_miss numa_foreign numa_interleave numa_local numa_other".split()
)


def online_pgdats(m: Machine) -> list[PgData]:
    """The online nodes in order."""
    return [m.nodes[nid] for nid in sorted(m.n_online)]


def shown_zones(m: Machine, pgdat: PgData) -> list[Zone]:
    """The zones of a node that the kernel was built with."""
    return [pgdat.zone(i) for i in m.config.zones]


def zoneinfo(m: Machine) -> str:
    """/proc/zoneinfo."""
    out: list[str] = []
    for pgdat in online_pgdats(m):
        first = next((z for z in pgdat.zones if z.populated), None)
        for zone in shown_zones(m, pgdat):
            out.append(f"Node {pgdat.node_id}, zone {zone.name:>8}")
            if zone is first:
                out.append("  per-node stats")
                out += [f"      {k:<12} {pgdat.vmstat.get(k, 0)}" for k in NODE_STAT_ITEMS]
            out += _zone_lines(m, zone)
    return "\n".join(out) + "\n"


def _zone_lines(m: Machine, zone: Zone) -> list[str]:
    reserve = ", ".join(str(zone.lowmem_reserve[i]) for i in m.config.zones)
    out = [
        f"  pages free     {zone.nr_free_pages}",
        f"        boost    {zone.watermark_boost}",
        f"        min      {zone.min_wmark_pages()}",
        f"        low      {zone.low_wmark_pages()}",
        f"        high     {zone.high_wmark_pages()}",
        f"        spanned  {zone.spanned_pages}",
        f"        present  {zone.present_pages}",
        f"        managed  {zone.managed_pages}",
        "        cma      0",
        f"        protection: ({reserve})",
    ]
    if not zone.populated:
        return out
    out.append(f"      {'nr_free_pages':<12} {zone.nr_free_pages}")
    out += [f"      {k:<12} {zone.vmstat.get(k, 0)}" for k in (*ZONE_STAT_ITEMS, *NUMA_STAT_ITEMS)]
    out.append("  pagesets")
    for cpu in range(m.nr_cpus):
        count, high, batch, _ = zone.pcp_state(cpu)
        out += [
            f"    cpu: {cpu}",
            f"              count: {count}",
            f"              high:  {high}",
            f"              batch: {batch}",
            f"  vm stats threshold: {zone.stat_threshold}",
        ]
    out += ["  node_unreclaimable:  0", f"  start_pfn:           {zone.zone_start_pfn}"]
    return out


def _populated_zones(m: Machine, nodes: set[int]) -> list[Zone]:
    return [z for nid in sorted(nodes) for z in m.nodes[nid].zones if z.populated]


def buddyinfo(m: Machine) -> str:
    """/proc/buddyinfo."""
    return "".join(
        f"Node {z.nid}, zone {z.name:>8} " + "".join(f"{n:6} " for n in z.nr_free()) + "\n"
        for z in _populated_zones(m, m.n_online)
    )


def pageblock_counts(m: Machine, zone: Zone) -> list[int]:
    """Return how many pageblocks of a zone have each migratetype."""
    first = zone.zone_start_pfn // PAGEBLOCK_NR_PAGES
    last = -(-zone.zone_end_pfn // PAGEBLOCK_NR_PAGES)
    # In parts of half a terabyte, as arrays for all of a large zone would not stay in caches.
    parts = [
        _pageblock_counts(m, zone, at, min(at + (1 << 18), last))
        for at in range(first, last, 1 << 18)
    ]
    return [sum(counts) for counts in zip(*parts, strict=True)] or [0] * MIGRATE_TYPES


def _pageblock_counts(m: Machine, zone: Zone, first: int, last: int) -> list[int]:
    online = (m.sections["flags"][first // 64 : -(-last // 64)] & 4) != 0
    if not online.any():
        return [0] * MIGRATE_TYPES
    mine = m.pageblocks["zone"][first:last] == zone.index + 1
    base = first // 64 * 64
    mine &= np.repeat(online, 64)[first - base : last - base]
    words = m.sections["pageblock_flags"][first // 64 : -(-last // 64)]
    shifts = np.arange(0, 64, 4, dtype=np.uint64)
    types = ((words[..., None] >> shifts) & np.uint64(7)).reshape(-1)[first - base : last - base]
    counts = np.bincount(types[mine].astype(np.int64), minlength=MIGRATE_TYPES)
    return [int(c) for c in counts[:MIGRATE_TYPES]]


def pagetypeinfo(m: Machine) -> str:
    """/proc/pagetypeinfo."""
    out: list[str] = []
    for nid in sorted(m.n_memory):
        zones = _populated_zones(m, {nid})
        out.append("Page block order: 9\nPages per block:  512\n")
        out.append(
            f"{'Free pages count per migrate type at order':<43} "
            + "".join(f"{o:6} " for o in range(MAX_ORDER))
        )
        for z in zones:
            for name, row in zip(MIGRATETYPE_NAMES, z.free_counts(), strict=True):
                cells = "".join(">100000 " if n > 100000 else f"{n:6} " for n in row)
                out.append(f"Node {nid:4}, zone {z.name:>8}, type {name:>12} " + cells)
        out.append("")
        names = "".join(f"{n:>12} " for n in MIGRATETYPE_NAMES)
        out.append(f"{'Number of blocks type':<23}" + names)
        for z in zones:
            counts = "".join(f"{n:12} " for n in pageblock_counts(m, z))
            out.append(f"Node {nid}, zone {z.name:>8} " + counts)
    return "\n".join(out) + "\n" if out else ""


def node_stat(m: Machine, name: str) -> int:
    """Return a node statistic summed over the machine."""
    return sum(p.vmstat.get(name, 0) for p in m.nodes.values())


def si_mem_available(m: Machine) -> int:
    """Return MemAvailable in pages."""
    low = sum(z.low_wmark_pages() for z in m.all_zones())
    free = sum(z.nr_free_pages for z in m.all_zones())
    files = node_stat(m, "nr_active_file") + node_stat(m, "nr_inactive_file")
    slab = node_stat(m, "nr_slab_reclaimable") + node_stat(m, "nr_kernel_misc_reclaimable")
    available = free - m.totalreserve_pages + files - min(files // 2, low)
    return max(0, available + slab - min(slab // 2, low))


Rows = list[tuple[str, int]]


def _zeros(*names: str) -> Rows:
    return [(name, 0) for name in names]


def _lru_rows(s: dict[str, int], zones: list[Zone]) -> Rows:
    """Rows of pages that programs and files use, KiB, from node statistics in KiB."""
    return [
        ("Active", s["nr_active_anon"] + s["nr_active_file"]),
        ("Inactive", s["nr_inactive_anon"] + s["nr_inactive_file"]),
        ("Active(anon)", s["nr_active_anon"]),
        ("Inactive(anon)", s["nr_inactive_anon"]),
        ("Active(file)", s["nr_active_file"]),
        ("Inactive(file)", s["nr_inactive_file"]),
        ("Unevictable", s["nr_unevictable"]),
        ("Mlocked", sum(z.vmstat.get("nr_mlock", 0) for z in zones) * 4),
    ]


def _slab_rows(s: dict[str, int]) -> Rows:
    return [
        ("KReclaimable", s["nr_slab_reclaimable"] + s["nr_kernel_misc_reclaimable"]),
        ("Slab", s["nr_slab_reclaimable"] + s["nr_slab_unreclaimable"]),
        ("SReclaimable", s["nr_slab_reclaimable"]),
        ("SUnreclaim", s["nr_slab_unreclaimable"]),
    ]


def _kernel_rows(s: dict[str, int]) -> Rows:
    return [
        ("KernelStack", s["nr_kernel_stack"] // 4),
        ("PageTables", s["nr_page_table_pages"]),
        *_zeros("SecPageTables", "NFS_Unstable", "Bounce", "WritebackTmp"),
    ]


def _huge_rows() -> Rows:
    return _zeros("AnonHugePages", "ShmemHugePages", "ShmemPmdMapped")


def _meminfo_rows(m: Machine) -> Rows:
    s = {k: node_stat(m, k) * 4 for k in NODE_STAT_ITEMS}
    zones = m.all_zones()
    return [
        ("MemTotal", m.totalram_pages * 4),
        ("MemFree", sum(z.nr_free_pages for z in zones) * 4),
        ("MemAvailable", si_mem_available(m) * 4),
        ("Buffers", 0),
        ("Cached", s["nr_file_pages"]),
        ("SwapCached", 0),
        *_lru_rows(s, zones),
        *_zeros("SwapTotal", "SwapFree", "Zswap", "Zswapped"),
        ("Dirty", s["nr_dirty"]),
        ("Writeback", s["nr_writeback"]),
        ("AnonPages", s["nr_anon_pages"]),
        ("Mapped", s["nr_mapped"]),
        ("Shmem", s["nr_shmem"]),
        *_slab_rows(s),
        *_kernel_rows(s),
        ("CommitLimit", m.totalram_pages * 4 * 50 // 100),
        ("Committed_AS", 0),
        ("VmallocTotal", 34359738367),
        *_zeros("VmallocUsed", "VmallocChunk", "Percpu"),
        ("HardwareCorrupted", m.num_poisoned_pages * 4),
        *_huge_rows(),
        *_zeros("FileHugePages", "FilePmdMapped"),
    ]


def meminfo(m: Machine) -> str:
    """/proc/meminfo; values in KiB."""
    out = [f"{name + ':':<16}{value:8} kB" for name, value in _meminfo_rows(m)]
    out += [f"HugePages_{k + ':':<9}{0:5}" for k in ("Total", "Free", "Rsvd", "Surp")]
    out += ["Hugepagesize:       2048 kB", "Hugetlb:               0 kB"]
    mapped = sum(r[1] - r[0] for r in m.numa_meminfo) // 1024
    out += ["DirectMap4k:           0 kB", f"DirectMap2M: {mapped:11} kB"]
    return "\n".join(out) + "\n"


def _node_meminfo_rows(pgdat: PgData) -> Rows:
    s = {k: pgdat.vmstat.get(k, 0) * 4 for k in NODE_STAT_ITEMS}
    total = pgdat.managed_pages * 4
    free = sum(z.nr_free_pages for z in pgdat.zones) * 4
    return [
        ("MemTotal", total),
        ("MemFree", free),
        ("MemUsed", total - free),
        ("SwapCached", 0),
        *_lru_rows(s, pgdat.zones),
        ("Dirty", s["nr_dirty"]),
        ("Writeback", s["nr_writeback"]),
        ("FilePages", s["nr_file_pages"]),
        ("Mapped", s["nr_mapped"]),
        ("AnonPages", s["nr_anon_pages"]),
        ("Shmem", s["nr_shmem"]),
        *_kernel_rows(s),
        *_slab_rows(s),
        *_huge_rows(),
    ]


def node_meminfo(m: Machine, nid: int) -> str:
    """/sys/devices/system/node/nodeN/meminfo; values in KiB."""
    rows = _node_meminfo_rows(m.nodes[nid])
    out = [f"Node {nid} {name + ':':<16}{value:8} kB" for name, value in rows]
    out += [f"Node {nid} {name:<15}{0:8} kB" for name in ("FileHugePages:", "FilePmdMapped:")]
    out.append(f"Node {nid} HugePages_Total: {0:5}")
    out += [f"Node {nid} HugePages_{k}:  {0:5}" for k in ("Free", "Surp")]
    return "\n".join(out) + "\n"


def kpageflags(m: Machine, pfn: int, count: int) -> list[tuple[int, int]]:
    """Return /proc/kpageflags of a range as runs of (pages, flags).

    :param pfn: first page; count: pages; the file ends with the section of the last page.
    """
    end = min(pfn + count, -(-m.max_pfn // PAGES_PER_SECTION) * PAGES_PER_SECTION)
    runs: list[tuple[int, int]] = []
    # In parts, so that terabytes need no array of all their words.
    for start in range(pfn, end, KPAGEFLAGS_CHUNK):
        words = np.zeros(min(KPAGEFLAGS_CHUNK, end - start), dtype=np.uint64)
        m.memmap_engine.kpageflags(start, words)
        edges = np.flatnonzero(np.diff(words)) + 1
        starts = np.concatenate(([0], edges))
        lengths = np.diff(np.concatenate((starts, [len(words)])))
        for s, n in zip(starts, lengths, strict=True):
            if runs and runs[-1][1] == int(words[s]):
                runs[-1] = (runs[-1][0] + int(n), runs[-1][1])
            else:
                runs.append((int(n), int(words[s])))
    return runs


def vmstat_lines(m: Machine, pgdat: PgData) -> str:
    """/sys/devices/system/node/nodeN/vmstat."""
    zones = pgdat.zones
    rows = [("nr_free_pages", sum(z.nr_free_pages for z in zones))]
    for k in (*ZONE_STAT_ITEMS, *NUMA_STAT_ITEMS):
        rows.append((k, sum(z.vmstat.get(k, 0) for z in zones)))
    rows += [(k, pgdat.vmstat.get(k, 0)) for k in NODE_STAT_ITEMS]
    return "".join(f"{k} {v}\n" for k, v in rows)


def iomem(m: Machine) -> str:
    """/proc/iomem."""
    return iomem_show(m.iomem_resource)


def parse_long(text: str) -> tuple[int, str] | None:
    """Take one number off a sysctl write, as the kernel does; None if there is none."""
    match = re.match(r"[ \t\n]*(-?)(0[xX][0-9a-fA-F]+|[0-9]+)(?=[ \t\n]|$)", text)
    if not match:
        return None
    digits = match[2]
    base = 16 if digits[:2].lower() == "0x" else 8 if len(digits) > 1 and digits[0] == "0" else 10
    try:
        value = int(digits, base)
    except ValueError:
        return None
    return (-value if match[1] else value), text[match.end() :]
