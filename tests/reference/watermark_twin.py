"""A slow, readable twin of watermarks, reserves and per-CPU list sizes; used by tests only.

Every function is one rule of the kernel, over plain attributes; all numbers are pages unless
their name says KiB.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isqrt
from typing import Protocol

DMA, DMA32, NORMAL, MOVABLE_ZONE, DEVICE = range(5)
PAGEBLOCK = 512


@dataclass
class Pcp:
    """One CPU's lists of a zone; on them stand (pfn, type that the page remembers)."""

    count: int = 0
    high: int = 0
    batch: int = 1
    factor: int = 0
    lists: list[list[tuple[int, int]]] = field(default_factory=lambda: [[] for _ in range(14)])


@dataclass(eq=False)
class ZoneMarks:
    """What the watermark rules read and write of a zone."""

    nid: int
    idx: int
    nr_cpus: int
    present: int = 0
    managed: int = 0
    wmark_min: int = 0
    wmark_low: int = 0
    wmark_high: int = 0
    boost: int = 0
    reserve: list[int] = field(default_factory=lambda: [0] * 5)
    pageset_high: int = 0
    pageset_batch: int = 0
    threshold: int = 0
    pcps: list[Pcp] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pcps = [Pcp() for _ in range(self.nr_cpus)]


@dataclass
class Tunables:
    """The files of /proc/sys/vm that the rules use."""

    min_free_kbytes: int = 1024
    user_min_free_kbytes: int = -1
    watermark_scale_factor: int = 10
    watermark_boost_factor: int = 15000
    lowmem_reserve_ratio: list[int] = field(default_factory=lambda: [256, 256, 32, 0, 0])
    percpu_pagelist_high_fraction: int = 0
    huge_pages: bool = True


class System(Protocol):
    """Nodes, zones and CPUs."""

    vm: Tunables
    n_online: set[int]
    cpus_of_node: dict[int, int]  # how many
    nr_cpus: int
    totalreserve_of_node: dict[int, int]

    def zones_of(self, nid: int) -> list[ZoneMarks]: ...
    def this_fallback(self) -> Iterable[ZoneMarks]: ...


def online_zones(s: System) -> list[ZoneMarks]:
    return [z for nid in sorted(s.n_online) for z in s.zones_of(nid)]


# -- sizes of the per-CPU lists -------------------------------------------------------------


def batch_size(managed: int) -> int:
    b = max(min(managed >> 10, 256) // 4, 1)
    power = 1
    while power * 2 <= b + b // 2:
        power *= 2
    return max(1, power - 1)


def as_int32(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def high_size(s: System, zone: ZoneMarks, batch: int) -> int:
    fraction = s.vm.percpu_pagelist_high_fraction
    total = zone.managed // fraction if fraction else zone.wmark_low + zone.boost
    share = total // (s.cpus_of_node.get(zone.nid, 0) or s.nr_cpus)
    return max(as_int32(share), 4 * batch)


def set_pageset(s: System, zone: ZoneMarks) -> None:
    batch = batch_size(zone.managed)
    high = high_size(s, zone, batch)
    if (high, batch) == (zone.pageset_high, zone.pageset_batch):
        return
    zone.pageset_high, zone.pageset_batch = high, batch
    for pcp in zone.pcps:
        pcp.high, pcp.batch = high, batch


# -- how much is kept free ------------------------------------------------------------------


def pages_above_high(s: System, highest: int) -> int:
    return sum(
        max(0, z.managed - (z.wmark_high + z.boost)) for z in s.this_fallback() if z.idx <= highest
    )


def calculate_min_free_kbytes(s: System) -> None:
    new = isqrt(pages_above_high(s, NORMAL) * 4 * 16)
    if new > s.vm.user_min_free_kbytes:
        s.vm.min_free_kbytes = min(max(new, 128), 262144)


def setup_per_zone_wmarks(s: System) -> None:
    pages_min = s.vm.min_free_kbytes // 4
    scale = s.vm.watermark_scale_factor
    # The kernel divides by the low 32 bits of the sum.
    total = sum(z.managed for z in online_zones(s)) % 2**32
    for zone in online_zones(s):
        zone.wmark_min = pages_min * zone.managed // total if total else 0
        by_size = zone.managed // 10000 * scale + zone.managed % 10000 * scale // 10000
        step = max(zone.wmark_min // 4, by_size)
        zone.boost = 0
        zone.wmark_low = zone.wmark_min + step
        zone.wmark_high = zone.wmark_low + step
    calculate_totalreserve(s)
    for zone in online_zones(s):
        set_pageset(s, zone)


def setup_lowmem_reserve(s: System) -> None:
    for nid in sorted(s.n_online):
        zones = s.zones_of(nid)
        for i in range(4):
            ratio = s.vm.lowmem_reserve_ratio[i]
            for j in range(i + 1, 5):
                above = sum(z.managed for z in zones[i + 1 : j + 1])
                keeps = ratio > 0 and zones[i].managed > 0
                zones[i].reserve[j] = above // ratio if keeps else 0
    calculate_totalreserve(s)


def calculate_totalreserve(s: System) -> None:
    for nid in sorted(s.n_online):
        s.totalreserve_of_node[nid] = sum(
            min(max(z.reserve[z.idx :]) + z.wmark_high + z.boost, z.managed)
            for z in s.zones_of(nid)
        )


def refresh_stat_thresholds(s: System, zones: Iterable[ZoneMarks]) -> None:
    for zone in zones:
        if zone.present:
            step = 1 + (zone.managed >> 15).bit_length()
            zone.threshold = min(125, 2 * s.nr_cpus.bit_length() * step)


def set_recommended_min_free_kbytes(s: System) -> None:
    populated = sum(z.present > 0 for z in online_zones(s) if z.idx <= NORMAL)
    pages = PAGEBLOCK * populated * 2 + PAGEBLOCK * populated * 9
    pages = min(pages, pages_above_high(s, NORMAL) // 20)
    s.vm.min_free_kbytes = max(s.vm.min_free_kbytes, pages * 4)
    setup_per_zone_wmarks(s)


def init_per_zone_wmark_min(s: System) -> None:
    calculate_min_free_kbytes(s)
    setup_per_zone_wmarks(s)
    refresh_stat_thresholds(s, online_zones(s))
    setup_lowmem_reserve(s)
    if s.vm.huge_pages:
        set_recommended_min_free_kbytes(s)


def set_huge_pages(s: System, wanted: bool) -> None:
    s.vm.huge_pages = wanted
    if wanted:
        set_recommended_min_free_kbytes(s)
    else:
        calculate_min_free_kbytes(s)
        setup_per_zone_wmarks(s)


# -- flags of a request: which mark, and what it may go below -------------------------------

WMARK_MIN, WMARK_LOW, WMARK_HIGH = 0, 1, 2
NO_WATERMARKS, OOM, NON_BLOCK, MIN_RESERVE = 0x4, 0x8, 0x10, 0x20
NOFRAGMENT, HIGH_ATOMIC, KSWAPD = 0x100, 0x200, 0x800
RESERVES = OOM | NON_BLOCK | MIN_RESERVE | HIGH_ATOMIC
