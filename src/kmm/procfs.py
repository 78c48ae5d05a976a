"""The texts of /proc that show memory (mm/vmstat.c, fs/proc)."""

from __future__ import annotations

import errno
import re
from typing import TYPE_CHECKING

import numpy as np

from kmm import _page_flags, memory_views
from kmm.errors import kernel_error
from kmm.hugetlb import hugetlb_report_meminfo, hugetlb_report_node_meminfo, hugetlb_total_pages
from kmm.mmzone import PgData, Zone
from kmm.params import (
    KPF_BUDDY,
    KPF_HWPOISON,
    MAX_ORDER,
    MIGRATETYPE_NAMES,
    NR_PAGES_MAX,
    PAGEBLOCK_NR_PAGES,
    PAGES_PER_SECTION,
)
from kmm.resource import iomem_show, walk_system_ram_range
from kmm.vmscan import MAX_RECLAIM_RETRIES, kswapd_failures
from kmm.vmstat import all_node_items, node_items, node_stat, zone_items, zone_numa_events

if TYPE_CHECKING:
    from kmm.machine import Machine

LOW_MEMORY_END = 0x100  # pfn of 1 MiB
PTRS_PER_PMD = 512  # pages of 4 KiB that one of 2 MiB maps
KPMSIZE = 8  # bytes of a page's word in kpageflags
KPAGEFLAGS_RUNS = 1 << 14  # runs that are taken from the engine at a time


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
                out += [f"      {k:<12} {n}" for k, n in node_items(m, pgdat).items()]
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
    out += [f"      {k:<12} {n}" for k, n in zone_items(zone).items()]
    out += [f"      {k:<12} {n}" for k, n in zone_numa_events(zone).items()]
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
    hopeless = int(kswapd_failures(m, zone.nid) >= MAX_RECLAIM_RETRIES)
    out.append(f"  node_unreclaimable:  {hopeless}")
    out.append(f"  start_pfn:           {zone.zone_start_pfn}")
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
    return _page_flags.pageblock_counts(
        m.memmap_engine, zone.zone_start_pfn, zone.zone_end_pfn, zone.index
    )


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
        ("Mlocked", sum(zone_items(z)["nr_mlock"] for z in zones) * 4),
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


def _huge_rows(s: dict[str, int]) -> Rows:
    names = {
        "AnonHugePages": "nr_anon_transparent_hugepages",
        "ShmemHugePages": "nr_shmem_hugepages",
        "ShmemPmdMapped": "nr_shmem_pmdmapped",
    }
    return [(name, s[item] * PAGEBLOCK_NR_PAGES) for name, item in names.items()]


def _swap_rows(m: Machine) -> Rows:
    total, free = (m.swap.pages, m.swap.nr_free) if m.swap is not None else (0, 0)
    return [("SwapTotal", total * 4), ("SwapFree", free * 4)]


def vm_commit_limit(m: Machine) -> int:
    """Return CommitLimit in pages: a number that was set, or a share of the RAM without huge pages.

    A negative share wraps around, as the kernel lets it.
    """
    swap = _swap_rows(m)[0][1] // 4
    if m.vm.overcommit_kbytes:
        return m.vm.overcommit_kbytes // 4 + swap
    pages = m.totalram_pages - hugetlb_total_pages(m)
    return pages * m.vm.overcommit_ratio % (1 << 64) // 100 + swap


def _meminfo_rows(m: Machine) -> Rows:
    s = {k: n * 4 for k, n in all_node_items(m).items()}
    zones = m.all_zones()
    return [
        ("MemTotal", m.totalram_pages * 4),
        ("MemFree", sum(z.nr_free_pages for z in zones) * 4),
        ("MemAvailable", si_mem_available(m) * 4),
        ("Buffers", 0),
        ("Cached", s["nr_file_pages"]),
        ("SwapCached", 0),
        *_lru_rows(s, zones),
        *_swap_rows(m),
        *_zeros("Zswap", "Zswapped"),
        ("Dirty", s["nr_dirty"]),
        ("Writeback", s["nr_writeback"]),
        ("AnonPages", s["nr_anon_pages"]),
        ("Mapped", s["nr_mapped"]),
        ("Shmem", s["nr_shmem"]),
        *_slab_rows(s),
        *_kernel_rows(s),
        ("CommitLimit", vm_commit_limit(m) * 4 % (1 << 64)),
        ("Committed_AS", 0),
        ("VmallocTotal", 34359738367),
        *_zeros("VmallocUsed", "VmallocChunk", "Percpu"),
        ("HardwareCorrupted", m.num_poisoned_pages * 4),
        *_huge_rows(s),
        *_zeros("FileHugePages", "FilePmdMapped"),
    ]


def direct_map(m: Machine) -> tuple[int, int]:
    """Return the KiB of RAM that the kernel maps by pages of 4 KiB and of 2 MiB.

    The hole below 1 MiB is mapped as if it were RAM; ends that are no multiple of 2 MiB, and what
    had been split when the machine was saved, by small pages.
    """
    total = large = 0
    start = end = 0
    ram = walk_system_ram_range(m.iomem_resource, 0, NR_PAGES_MAX)
    for first, last in [(0, LOW_MEMORY_END), *((p, p + n) for p, n in ram), (1 << 62, 0)]:
        if first <= end:
            end = max(end, last)
            continue
        total += end - start
        large += max(0, end // PTRS_PER_PMD - -(-start // PTRS_PER_PMD))
        start, end = first, last
    split = min(m.direct_map_splits, large)
    large = (large - split) * PTRS_PER_PMD
    return (total - large) * 4, large * 4


def load_direct_map(m: Machine, text: str) -> None:
    """Take over from a /proc/meminfo how many pieces of 2 MiB had been split."""
    if match := re.search(r"^DirectMap4k: +([0-9]{1,15}) kB$", text, re.M):
        kib = int(match[1]) - direct_map(m)[0]
        m.direct_map_splits = max(0, kib // (PTRS_PER_PMD * 4))


def meminfo(m: Machine) -> str:
    """/proc/meminfo; values in KiB."""
    out = [f"{name + ':':<16}{value:8} kB" for name, value in _meminfo_rows(m)]
    out += hugetlb_report_meminfo(m)
    small, large = direct_map(m)
    out += [f"DirectMap4k: {small:11} kB", f"DirectMap2M: {large:11} kB"]
    return "\n".join(out) + "\n"


def _node_meminfo_rows(m: Machine, pgdat: PgData) -> Rows:
    s = {k: n * 4 for k, n in node_items(m, pgdat).items()}
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
        *_huge_rows(s),
    ]


def node_meminfo(m: Machine, nid: int) -> str:
    """/sys/devices/system/node/nodeN/meminfo; values in KiB."""
    rows = _node_meminfo_rows(m, m.nodes[nid])
    out = [f"Node {nid} {name + ':':<16}{value:8} kB" for name, value in rows]
    out += [f"Node {nid} {name:<15}{0:8} kB" for name in ("FileHugePages:", "FilePmdMapped:")]
    out += hugetlb_report_node_meminfo(m, nid)
    return "\n".join(out) + "\n"


def kpageflags(m: Machine, pfn: int, count: int) -> list[tuple[int, int]]:
    """Return /proc/kpageflags of a range as runs of (pages, flags).

    :param pfn: first page; count: pages; the file ends with the section of the last page.
    """
    end = min(pfn + count, -(-m.max_pfn // PAGES_PER_SECTION) * PAGES_PER_SECTION)
    runs: list[tuple[int, int]] = []
    for bad in memory_views.poisoned_and_free(m, pfn, end):
        runs += [*_kpageflags(m, pfn, bad), (1, KPF_BUDDY | KPF_HWPOISON)]
        pfn = bad + 1
    return runs + _kpageflags(m, pfn, end)


def kpageflags_read(m: Machine, offset: int, size: int) -> bytes:
    """Return a piece of /proc/kpageflags: a word of 8 bytes a page, as the host stores them.

    :param offset, size: bytes, multiples of 8.
    :raises InvalidArgument: if they are not (fs/proc/page.c).
    """
    if offset % KPMSIZE or size % KPMSIZE:
        raise kernel_error(
            -errno.EINVAL,
            f"{size} bytes at {offset}; allowed: multiples of {KPMSIZE}",
        )
    pfn = offset // KPMSIZE
    end = min(pfn + size // KPMSIZE, -(-m.max_pfn // PAGES_PER_SECTION) * PAGES_PER_SECTION)
    return memory_views.kpageflags(m, pfn, end - pfn).tobytes() if pfn < end else b""


def _kpageflags(m: Machine, pfn: int, end: int) -> list[tuple[int, int]]:
    """The same, without the marks of pages that are broken and free."""
    runs: list[tuple[int, int]] = []
    lengths = np.zeros(KPAGEFLAGS_RUNS, dtype=np.uint64)
    words = np.zeros(KPAGEFLAGS_RUNS, dtype=np.uint64)
    at = pfn
    while at < end:
        n, at = _page_flags.kpageflags_runs(m.memmap_engine, at, end, lengths, words)
        more = list(zip(lengths[:n].tolist(), words[:n].tolist(), strict=True))
        if runs and runs[-1][1] == more[0][1]:
            more[0] = (more[0][0] + runs.pop()[0], more[0][1])
        runs += more
    return runs


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
