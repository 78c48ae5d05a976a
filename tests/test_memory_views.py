"""Arrays show what the texts show."""

from __future__ import annotations

import re
import resource
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmm import (
    GFP_HIGHUSER_MOVABLE,
    GFP_KERNEL,
    KernelError,
    Machine,
    MachineConfig,
    _page_flags,
    procfs,
)
from kmm._memmap import MemMap, page_dtype, pageblock_dtype, section_dtype
from kmm.mmzone import Zone
from kmm.page_alloc import drain_all_pages
from kmm.params import KPF_BUDDY, KPF_HWPOISON, MIGRATETYPE_NAMES, ZONE_NAMES
from tests.conftest import DIMM, two_nodes


def used_machine() -> Machine:
    """Memory of boot, hot-added memory with its memmap inside, holes, blocks of all sizes used."""
    m = two_nodes("memhp_default_state=online_kernel memory_hotplug.memmap_on_memory=1")
    m.plug("a", 1, DIMM, 128 << 20)
    m.plug("b", 1, DIMM + (128 << 20), 128 << 20)
    m.write("/sys/devices/system/memory/auto_online_blocks", "online_movable")
    m.plug("c", 1, DIMM + (512 << 20), 256 << 20)
    m.write("/sys/devices/system/memory/auto_online_blocks", "offline")
    m.plug("d", 0, DIMM + (1 << 30), 128 << 20)
    for order in range(11):
        for gfp in (GFP_KERNEL, GFP_KERNEL | 0x10, GFP_HIGHUSER_MOVABLE):
            m.alloc_pages_bulk(7, order, gfp, 1)
    return m


def test_free_blocks_are_those_of_buddyinfo_and_pagetypeinfo() -> None:
    m = used_machine()
    blocks = m.free_blocks()
    assert blocks.shape == (2, 5, 5, 11)
    assert blocks.dtype == np.int64
    rows = re.findall(r"Node (\d+), zone +(\w+) (.*)", m.read("/proc/buddyinfo"))
    assert len(rows) == 4
    for nid, zone, counts in rows:
        of_zone = blocks[int(nid), ZONE_NAMES.index(zone)]
        assert of_zone.sum(axis=0).tolist() == [int(n) for n in counts.split()]
    text = m.read("/proc/pagetypeinfo")
    for nid, zone, mt, counts in re.findall(r"Node +(\d+), zone +(\w+), type +(\w+) (.*)", text):
        row = blocks[int(nid), ZONE_NAMES.index(zone), MIGRATETYPE_NAMES.index(mt)]
        assert row.tolist() == [int(n) for n in counts.split()]
    m.validate()


def blocks_one_by_one(m: Machine, zone: Zone) -> list[int]:
    """As pagetypeinfo_showblockcount_print goes through a zone's span."""
    counts = [0] * 5
    for pfn in range(zone.zone_start_pfn & ~511, zone.zone_end_pfn, 512):
        if m.section_flags(pfn) & 4 and m.page_zone(pfn) is zone:
            counts[m.memmap_engine.get_pageblock_migratetype(pfn)] += 1
    return counts


def test_pageblocks_are_counted_as_one_by_one() -> None:
    m = used_machine()
    counted = [procfs.pageblock_counts(m, z) for z in m.all_zones()]
    assert counted == [blocks_one_by_one(m, z) for z in m.all_zones()]
    assert counted[7][0] >= 2  # the memmaps
    m.validate()


def test_zones_of_one_node_may_alternate_block_by_block() -> None:
    m = two_nodes()
    m.plug("a", 1, DIMM, 512 << 20)
    for i, how in enumerate(("online_kernel", "online_movable", "offline", "online_kernel")):
        if how != "offline":
            m.write(f"/sys/devices/system/memory/memory{32 + i}/state", how)
    assert procfs.pageblock_counts(m, m.nodes[1].zone(2)) == [0, 128, 0, 0, 0]
    assert procfs.pageblock_counts(m, m.nodes[1].zone(3)) == [0, 64, 0, 0, 0]
    m.validate()


@pytest.mark.parametrize("room", [1, 3, 1 << 14])
def test_runs_of_page_flags_are_those_of_the_pages(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = used_machine()
    monkeypatch.setattr(procfs, "KPAGEFLAGS_RUNS", room)
    for start, count in ((0, 5000), (DIMM >> 12, 32768 * 6), ((DIMM >> 12) + 700, 3000)):
        runs = procfs.kpageflags(m, start, count)
        words = [np.full(n, word, dtype=np.uint64) for n, word in runs]
        assert (np.concatenate(words) == m.kpageflags(start, count)).all()
        assert all(a[1] != b[1] for a, b in pairwise(runs))
    m.validate()


def test_page_flags_tell_memmap_free_and_absent_pages_apart() -> None:
    m = used_machine()
    words = m.kpageflags(DIMM >> 12, 65536 + 512)
    assert set(words[:512].tolist()) == {0x2100000000}
    assert set(words[65536:].tolist()) == {0x100000}
    free = int((words[:65536] == 0x400).sum())
    assert free == sum(n << o for o, n in enumerate(m.nodes[1].zone(2).nr_free()))
    with pytest.raises(KernelError, match="count: -1; allowed"):
        m.kpageflags(0, -1)
    m.validate()


def test_looking_at_pages_touches_none_of_their_records() -> None:
    """A pageblock without page records of its own is not asked for them."""
    m = Machine(
        MachineConfig.from_dict(
            {"memory": "6G", "maxmem": "64G", "nodes": [{"cpus": "0", "memory": "6G"}]}
        )
    )

    assert len(m.alloc_pages_bulk(500, 10)) == 500
    words = np.ones(1 << 19, dtype=np.uint64)

    def faults() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    before = faults()
    _page_flags.kpageflags(m.memmap_engine, 1 << 20, words)
    procfs.kpageflags(m, 1 << 20, 1 << 19)
    touched = faults() - before
    assert touched < 100  # the records fill 2048 pages of the host
    assert {0, 0x400} <= set(np.unique(words).tolist())
    m.validate()


@settings(max_examples=30, deadline=None)
@given(
    zones=st.lists(st.integers(-1, 1), min_size=128, max_size=128),
    types=st.lists(st.integers(0, 4), min_size=128, max_size=128),
    early=st.booleans(),
    hole=st.sampled_from([0, 9]),
    start=st.integers(0, 2 * 32768 - 1),
    count=st.integers(1, 2 * 32768),
)
def test_pageblocks_are_counted_by_zone_and_type(
    zones: list[int], types: list[int], early: bool, hole: int, start: int, count: int
) -> None:
    pages = np.zeros(2 * 32768, dtype=page_dtype)
    sections = np.zeros(2, dtype=section_dtype)
    states, blocks = np.zeros(2 * 32768, np.uint8), np.zeros(128, dtype=pageblock_dtype)
    memmap = MemMap(pages, states, blocks, sections, 5)
    if not early:  # then each section is of one zone, but for a hole
        zones = [zones[i // 64 * 64] if i % 64 >= hole else -1 for i in range(128)]
    for i, (zone, mt) in enumerate(zip(zones, types, strict=True)):
        memmap.memmap_init_range(i * 512, 512, zone, mt, 0)
    sections["flags"] = 4 | 8 * early
    end = min(start + count, 2 * 32768)
    for zone in (0, 1):
        want = [0] * 5
        for i in range(start // 512, -(-end // 512)):
            want[types[i]] += zones[i] == zone
        assert _page_flags.pageblock_counts(memmap, start, end, zone) == want
    sections["flags"][1] = 0
    assert _page_flags.pageblock_counts(memmap, 32768, 2 * 32768, 0) == [0] * 5


def test_a_broken_page_keeps_its_mark_in_a_free_block() -> None:
    """Freeing a block clears its pages' marks but this one, and does not look for it."""
    m = two_nodes("memhp_default_state=online_movable")
    m.plug("a", 1, DIMM, 128 << 20)
    for order in (3, 9, 10):
        pfn = m.alloc_pages(order, GFP_HIGHUSER_MOVABLE, 1)
        with pytest.raises(KernelError):
            m.write("/sys/devices/system/memory/hard_offline_page", hex((pfn + 5) << 12))
        assert int(m.kpageflags(pfn + 5, 1)[0]) == KPF_HWPOISON
        m.free_pages(pfn, order)
        drain_all_pages(m)
        words = m.kpageflags(pfn, 8).tolist()
        assert words == [KPF_BUDDY] * 5 + [KPF_BUDDY | KPF_HWPOISON] + [KPF_BUDDY] * 2
        runs = procfs.kpageflags(m, pfn, 8)
        assert runs == [(5, KPF_BUDDY), (1, KPF_BUDDY | KPF_HWPOISON), (2, KPF_BUDDY)]
        assert procfs.kpageflags(m, pfn + 5, 1) == [(1, KPF_BUDDY | KPF_HWPOISON)]
    m.validate()
