"""What a real 6.1 kernel showed of its allocator: who gets which page, lists, claims, marks."""

from __future__ import annotations

from typing import Any

import pytest

from kmm import GFP_HIGHUSER_MOVABLE, GFP_KERNEL, Machine, memory_hotplug, procfs
from kmm.gfp import __GFP_RECLAIMABLE
from kmm.mmzone import Zone
from kmm.replay import boot_machine, snapshot_files
from kmm.watermarks import init_per_zone_wmark_min
from tests.conftest import DIMM, recording, two_nodes

START = DIMM >> 12
BLOCK = 32768
SECTION = 128 << 20
GFP_TRANSHUGE = 0x1C24CA
STATE = "/sys/devices/system/memory/memory%d/state"
UNMOVABLE, MOVABLE, RECLAIMABLE, ISOLATE = 0, 1, 2, 4


def kernel_blocks(n: int, cmdline: str = "") -> tuple[Machine, Zone]:
    """A node 1 that has nothing but n blocks in its Normal zone, onlined one after the other."""
    m = two_nodes("memhp_default_state=online_kernel " + cmdline)
    m.plug("a", 1, DIMM, n * SECTION)
    return m, m.nodes[1].zone(2)


def types(m: Machine, pfn: int, count: int) -> list[int]:
    return [m.memmap_engine.get_pageblock_migratetype(pfn + i * 512) for i in range(count)]


def real_machine(name: str = "movable_node") -> Machine:
    """The recorded guest of 1 GiB, after its files were read once."""
    m = boot_machine(recording(name))
    snapshot_files(m)
    return m


def marks(zone: Zone) -> tuple[int, int, int]:
    return zone.min_wmark_pages(), zone.low_wmark_pages(), zone.high_wmark_pages()


# -- free lists after onlining ----------------------------------------------------------------


@pytest.fixture
def isolated(monkeypatch: pytest.MonkeyPatch) -> list[dict[int, list[int]]]:
    """The Isolate lists as they are just before the isolation is undone, one entry an onlining."""
    seen: list[dict[int, list[int]]] = []
    undo = memory_hotplug.undo_isolate_page_range

    def spy(m: Machine, zone: Zone, *args: Any) -> None:
        lists = {o: zone.free_list(o, ISOLATE) for o in range(11)}
        seen.append({o: pfns for o, pfns in lists.items() if pfns})
        undo(m, zone, *args)

    monkeypatch.setattr(memory_hotplug, "undo_isolate_page_range", spy)
    return seen


def test_a_block_comes_online_as_32_blocks_of_order_10(
    isolated: list[dict[int, list[int]]],
) -> None:
    m, zone = kernel_blocks(1)
    pfns = list(range(START, START + BLOCK, 1024))
    assert isolated == [{10: pfns}]
    assert zone.free_list(10, MOVABLE) == pfns
    assert sum(map(sum, zone.free_counts())) == 32
    assert (zone.managed_pages, zone.present_pages, zone.nr_free_pages) == (BLOCK,) * 3
    m.validate()


def test_a_block_with_its_memmap_has_one_block_of_order_9_and_31_of_order_10(
    isolated: list[dict[int, list[int]]],
) -> None:
    m, zone = kernel_blocks(1, "memory_hotplug.memmap_on_memory=1")
    lists = {9: [START + 512], 10: list(range(START + 1024, START + BLOCK, 1024))}
    assert isolated == [lists]
    assert {o: zone.free_list(o, MOVABLE) for o in (9, 10)} == lists
    assert sum(map(sum, zone.free_counts())) == 32
    assert (zone.managed_pages, zone.present_pages, zone.nr_free_pages) == (32256, BLOCK, 32256)
    m.validate()


def test_a_blocks_memmap_is_one_unmovable_pageblock_of_reserved_pages() -> None:
    m, zone = kernel_blocks(1, "memory_hotplug.memmap_on_memory=1")
    assert procfs.pageblock_counts(m, zone) == [1, 63, 0, 0, 0]
    assert procfs.kpageflags(m, START, 1024) == [(512, 0x2100000000), (512, 0x400)]
    m.validate()


def test_blocks_onlined_earlier_are_used_first_and_each_from_its_lowest_address() -> None:
    m = two_nodes()
    m.plug("a", 1, DIMM, 3 * SECTION)
    for block in (33, 32, 34):
        m.write(STATE % block, "online_kernel")
    zone = m.nodes[1].zone(2)
    order = [START + b * BLOCK + i for b in (1, 0, 2) for i in range(0, BLOCK, 1024)]
    assert zone.free_list(10, MOVABLE) == order
    assert m.alloc_pages_bulk(96, 10, GFP_HIGHUSER_MOVABLE, 1).tolist()[:70] == order[:70]
    m.validate()


def test_the_lone_order_9_block_beside_a_memmap_serves_small_requests_first() -> None:
    m, _ = kernel_blocks(1, "memory_hotplug.memmap_on_memory=1")
    pfns = m.alloc_pages_bulk(513, 0, GFP_HIGHUSER_MOVABLE, 1)
    assert pfns.tolist() == list(range(START + 512, START + 1025))
    m.validate()


# -- who gets which page ----------------------------------------------------------------------


@pytest.mark.parametrize("single", [True, False])
def test_single_pages_of_a_fresh_block_come_upward(single: bool) -> None:
    m, _ = kernel_blocks(3)
    if single:
        pfns = [m.alloc_pages(0, GFP_KERNEL, 1) for _ in range(2048)]
    else:
        pfns = m.alloc_pages_bulk(2048, 0, GFP_KERNEL, 1).tolist()
    assert pfns == list(range(START, START + 2048))
    m.validate()


def test_the_first_requests_of_three_types_claim_the_blocks_that_a_real_kernels_did() -> None:
    """Page table, anonymous page, reclaimable slab on a fresh node 1 Normal of three blocks."""
    m, zone = kernel_blocks(3)
    assert zone.pageset_batch == 31
    assert m.alloc_pages(0, GFP_KERNEL | 0x400000, 1) == 0x100000
    assert zone.pcp_list(0, UNMOVABLE) == list(range(0x100001, 0x10001F))
    assert m.alloc_pages(0, GFP_HIGHUSER_MOVABLE, 1) == 0x100400
    assert zone.pcp_list(0, MOVABLE) == list(range(0x100401, 0x10041F))
    assert m.alloc_pages(0, GFP_KERNEL | __GFP_RECLAIMABLE, 1) == 0x100800
    assert types(m, 0x100000, 8) == [0, 0, 1, 1, 2, 2, 1, 1]
    assert procfs.pageblock_counts(m, zone) == [2, 188, 2, 0, 0]
    m.validate()


def test_what_is_left_of_a_claimed_block_serves_later_requests_of_its_type() -> None:
    """The head of order 10 is claimed whole: 1024 pages, two pageblocks, and nothing boosted."""
    m, zone = kernel_blocks(3)
    m.alloc_pages(0, GFP_KERNEL, 1)
    assert types(m, START, 3) == [UNMOVABLE, UNMOVABLE, MOVABLE]
    left = [zone.free_counts()[UNMOVABLE][o] << o for o in range(11)]
    assert sum(left) == 1024 - 31
    assert zone.watermark_boost == 0
    pfns = m.alloc_pages_bulk(33 * 31 - 1, 0, GFP_KERNEL, 1)
    assert pfns.tolist() == list(range(START + 1, START + 1023))
    assert types(m, START, 3) == [UNMOVABLE, UNMOVABLE, MOVABLE]
    assert m.alloc_pages(0, GFP_HIGHUSER_MOVABLE, 1) == START + 1024
    # One page is left of it; the rest of the refill claims the next head.
    assert m.alloc_pages(0, GFP_KERNEL, 1) == START + 1023
    assert zone.pcp_list(0, UNMOVABLE) == list(range(START + 2048, START + 2048 + 30))
    m.validate()


# -- per-CPU lists ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "batch"), [(1, 7), (2, 15), (3, 31), (4, 31), (5, 31), (6, 63), (7, 63)]
)
def test_a_refill_grows_with_the_blocks_of_a_zone(blocks: int, batch: int) -> None:
    m, zone = kernel_blocks(blocks)
    assert zone.pageset_batch == batch
    m.alloc_pages(nid=1)
    assert zone.pcp_state(0)[0] == batch - 1
    assert zone.nr_free_pages == blocks * BLOCK - batch
    m.validate()


def test_a_huge_page_leaves_another_on_the_cpus_list() -> None:
    m = two_nodes("memhp_default_state=online_movable")
    m.plug("a", 1, DIMM, SECTION)
    zone = m.nodes[1].zone(3)
    pfn = m.alloc_pages(9, GFP_TRANSHUGE, 1)
    assert pfn == START
    assert zone.pcp_list(0, 13) == [START + 512]
    assert zone.pcp_state(0)[0] == 512
    assert zone.nr_free_pages == BLOCK - 1024
    assert procfs.kpageflags(m, START + 512, 512) == [(512, 0)]
    m.validate()


def test_zoneinfo_shows_what_lies_on_a_cpus_lists() -> None:
    m, _ = kernel_blocks(3)
    m.alloc_pages(nid=1, cpu=1)
    text = m.read("/proc/zoneinfo").split("Node 1, zone   Normal")[1]
    counts = [line.split()[-1] for line in text.splitlines() if " count:" in line]
    assert counts[:2] == ["0", "30"]
    m.validate()


# -- page records -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "flags"), [("online_kernel", 0x57FFFFC0000000), ("online_movable", 0x5FFFFFC0000000)]
)
def test_a_pages_flags_word_holds_its_node_and_zone(how: str, flags: int) -> None:
    m = two_nodes("memhp_default_state=" + how)
    m.plug("a", 1, DIMM, SECTION)
    m.dump_page(START, "unmovable page")
    assert m.log[-2].startswith(f"flags: {flags:#x}(node=1|zone=")
    m.validate()


# -- watermarks and reserves --------------------------------------------------------------------


def test_a_users_minimum_is_raised_for_huge_pages_when_memory_is_added() -> None:
    """DMA 3840, DMA32 61575, Normal 65536 pages; 8192 kB written; then 32256 pages come."""
    m, _ = kernel_blocks(2)
    dma, dma32 = m.nodes[0].zone(0), m.nodes[0].zone(1)
    kept = dma.managed_pages, dma32.managed_pages
    dma.managed_pages, dma32.managed_pages = 3840, 61575
    m.write("/proc/sys/vm/min_free_kbytes", "8192")
    m.memmap_on_memory = True
    m.log.clear()
    m.write("/sys/devices/system/memory/auto_online_blocks", "online_movable")
    m.plug("b", 1, DIMM + 2 * SECTION, SECTION)
    assert m.nodes[1].zone(3).managed_pages == 32256
    assert m.vm.min_free_kbytes == 25696
    assert m.log[-2:] == [
        "min_free_kbytes is not updated to 2860 because user defined value 8192 is preferred",
        "khugepaged: raising min_free_kbytes from 8192 to 25696 to help transparent hugepage "
        "allocations",
    ]
    dma.managed_pages, dma32.managed_pages = kept
    init_per_zone_wmark_min(m)
    m.validate()


def test_sizes_of_per_cpu_lists_follow_the_low_marks() -> None:
    m = real_machine()
    zones = [m.nodes[0].zone(0), m.nodes[0].zone(1), m.nodes[1].zone(3)]
    assert [z.pcp_state(1)[1:3] for z in zones[:2]] == [(118, 1), (6920, 63)]
    m.plug("a", 1, DIMM, SECTION)
    m.write(STATE % 32, "online_movable")
    assert [z.pcp_state(1)[1:3] for z in zones] == [(103, 1), (6056, 63), (880, 7)]
    m.validate()


@pytest.fixture
def with_memmap() -> Machine:
    """1 GiB at boot and, on node 0, a Movable block that holds its own memmap."""
    m = real_machine()
    m.memmap_on_memory = True
    m.plug("a", 0, DIMM, SECTION)
    m.write(STATE % 32, "online_movable")
    m.memmap_on_memory = False
    return m


def test_reserves_and_thresholds_of_a_zone_without_its_memmap(with_memmap: Machine) -> None:
    m = with_memmap
    dma, dma32, movable = (m.nodes[0].zone(i) for i in (0, 1, 3))
    assert [z.managed_pages for z in (dma, dma32, movable)] == [3840, 225415, 32256]
    assert dma.lowmem_reserve == (0, 880, 880, 1006, 1006)
    assert dma32.lowmem_reserve == (0, 0, 0, 126, 126)
    assert [z.stat_threshold for z in (dma, dma32, movable)] == [4, 16, 4]
    m.validate()


def test_marks_with_a_movable_and_a_normal_zone_and_none_rebuilt_for_more(
    with_memmap: Machine,
) -> None:
    m = with_memmap
    assert m.vm.min_free_kbytes == 45056
    m.plug("b", 1, DIMM + SECTION, 2 * SECTION)
    m.write(STATE % 33, "online_kernel")
    assert m.vm.min_free_kbytes == 52124
    assert marks(m.nodes[0].zone(0)) == (170, 212, 254)
    assert marks(m.nodes[0].zone(1)) == (9981, 12476, 14971)
    assert marks(m.nodes[0].zone(3)) == (1428, 1785, 2142)
    assert marks(m.nodes[1].zone(2)) == (1451, 1813, 2175)
    m.log.clear()
    m.write(STATE % 34, "online_kernel")
    assert m.vm.min_free_kbytes == 58648
    assert m.log == []
    m.validate()


def test_the_first_change_of_memory_brings_the_protection_of_boot_up_to_date() -> None:
    m = boot_machine(recording("movable_node"))
    dma = m.nodes[0].zone(0)
    assert dma.lowmem_reserve[1] == 870
    m.plug("a", 1, DIMM, SECTION)
    assert dma.lowmem_reserve[1] == 870
    m.write(STATE % 32, "online_movable")
    assert dma.lowmem_reserve[1] == 880
    m.validate()


def test_available_memory_is_that_of_the_recorded_figures() -> None:
    m = real_machine()
    dma32, pgdat = m.nodes[0].zone(1), m.nodes[0]
    assert m.totalreserve_pages == 880 + 284 + 16609
    kept = dma32.nr_free_pages, dict(pgdat.vmstat)
    dma32.nr_free_pages += 216714 - sum(z.nr_free_pages for z in m.all_zones())
    zeros = ("nr_active_file", "nr_inactive_file", "nr_kernel_misc_reclaimable")
    pgdat.vmstat.update(dict.fromkeys(zeros, 0), nr_slab_reclaimable=2263)
    assert "MemAvailable:     800292 kB\n" in m.read("/proc/meminfo")
    dma32.nr_free_pages = kept[0]
    pgdat.vmstat.update(kept[1])
    m.validate()


# -- zonelists ------------------------------------------------------------------------------------


def test_when_zonelists_are_built_and_what_they_count() -> None:
    m = real_machine()
    m.log.clear()
    m.plug("a", 1, DIMM, 2 * SECTION)
    built = [line for line in m.log if line.startswith(("Fallback", "Built", "Policy"))]
    assert built == [
        "Fallback order for Node 1: 1 0 ",
        "Built 1 zonelists, mobility grouping on.  Total pages: 212362",
        "Policy zone: DMA32",
    ]
    m.log.clear()
    m.write(STATE % 32, "online_movable")
    assert m.log == [
        "Fallback order for Node 0: 0 1 ",
        "Fallback order for Node 1: 1 0 ",
        "Built 2 zonelists, mobility grouping on.  Total pages: 245130",
        "Policy zone: DMA32",
    ]
    m.log.clear()
    m.write(STATE % 33, "online_movable")
    assert m.log == []
    m.write(STATE % 33, "offline")
    assert m.log == []
    m.write(STATE % 32, "offline")
    assert m.log[:2] == ["Fallback order for Node 0: 0 1 ", "Fallback order for Node 1: 1 0 "]
    assert m.log[2].startswith("Built 2 zonelists, mobility grouping on.  Total pages: 2123")
    m.log.clear()
    m.unplug("a")
    assert not [line for line in m.log if "zonelists" in line]
    m.validate()


def test_the_policy_zone_rises_with_a_normal_zone_and_stays() -> None:
    m = real_machine()
    m.plug("a", 1, DIMM, SECTION)
    m.write(STATE % 32, "online_kernel")
    assert m.log[-1] == "Policy zone: Normal"
    m.write(STATE % 32, "offline")
    assert m.log[-1] == "Policy zone: Normal"
    m.validate()


def test_a_nodes_daemons_live_from_its_first_memory_to_its_last() -> None:
    m = two_nodes()
    m.plug("a", 1, DIMM, 2 * SECTION)
    assert "kswapd1" not in m.kthreads
    for block, how, alive in ((32, "online_kernel", True), (33, "online_movable", True),
                              (32, "offline", True), (33, "offline", False)):  # fmt: skip
        m.write(STATE % block, how)
        assert ("kswapd1" in m.kthreads) == alive
    m.validate()
