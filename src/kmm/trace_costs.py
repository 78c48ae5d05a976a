"""What a call costs in virtual time: estimates by the work that it does, on no machine measured.

They are there to give a chain a shape: what grows with the pages does so here, what copies or
clears memory costs more than what sets a flag, what makes a device or a thread more than either.
They are reckoned, not timed, from four round figures:

* 100 ns for a call that looks something up or changes a few fields, 500 ns where it takes locks
  and walks lists, which is also the cost of every function that is not in the table;
* 10 bytes a nanosecond for memory that is written or copied: a page 400 ns, a struct page 6 ns,
  2 MiB of memmap 200 µs;
* 20 µs for what makes or removes a device in sysfs and sends its uevent, or starts or ends a
  thread;
* 10 µs for what all CPUs have to take part in, 5 ms where RCU's grace period is waited for.

What a machine waits for by its own clock (an offline that is tried again, a throttled writer) is
not estimated: it is added as it was.
"""

from __future__ import annotations

from kmm.params import PAGEBLOCK_NR_PAGES, PAGES_PER_SECTION

#: ns of a call that is not in the table, itself and what is not recorded below it.
DEFAULT = 500
_LOOK, _DEVICE, _ALL_CPUS, _GRACE_PERIOD = 100, 20_000, 10_000, 5_000_000
_PAGE, _PAGEBLOCK, _SECTION = 1, PAGEBLOCK_NR_PAGES, PAGES_PER_SECTION

#: By function: ns a call, pages of a unit of work, ns a unit.
COSTS: dict[str, tuple[int, int, int]] = {
    "zone_for_pfn_range": (_LOOK, _PAGE, 0),
    "check_hotplug_memory_range": (_LOOK, _PAGE, 0),
    "resize_zone_range": (_LOOK, _PAGE, 0),
    "resize_pgdat_range": (_LOOK, _PAGE, 0),
    "adjust_present_page_count": (_LOOK, _PAGE, 0),
    "node_states_check_changes_online": (_LOOK, _PAGE, 0),
    "node_states_check_changes_offline": (_LOOK, _PAGE, 0),
    # An entry of the direct map for each 2 MiB, one of 2 MiB's memmap for each 128 MiB.
    "init_memory_mapping": (DEFAULT, _PAGEBLOCK, 10),
    "vmemmap_populate": (DEFAULT, _SECTION, 200_000),
    "sparse_remove_section": (DEFAULT, _SECTION, 20_000),
    "memmap_init_range": (DEFAULT, _PAGE, 6),
    "remove_pfn_range_from_zone": (DEFAULT, _PAGE, 6),
    "online_mem_sections": (_LOOK, _SECTION, 10),
    "offline_mem_sections": (_LOOK, _SECTION, 10),
    # Every page of a chunk of 4 MiB has its flags and count set before it is freed.
    "generic_online_page": (1024 * 3, _PAGE, 0),
    "unset_migratetype_isolate": (DEFAULT, _PAGE, 0),
    "start_isolate_page_range": (DEFAULT, _PAGEBLOCK, 1_000),
    "isolate_single_pageblock": (1_000, _PAGE, 0),
    "test_pages_isolated": (DEFAULT, _PAGE, 2),
    "scan_movable_pages": (DEFAULT, _PAGE, 2),
    "__offline_isolated_pages": (DEFAULT, _PAGEBLOCK, 100),
    "dissolve_free_huge_pages": (DEFAULT, _PAGEBLOCK, 50),
    # A copy, and unmapping and mapping it again.
    "migrate_pages": (2_000, _PAGE, 1_400),
    "isolate_lru_page": (200, _PAGE, 0),
    "alloc_migration_target": (300, _PAGE, 0),
    "__alloc_pages": (300, _PAGE, 0),
    "add_memory_block": (_DEVICE, _PAGE, 0),
    "remove_memory_block": (_DEVICE, _PAGE, 0),
    "device_online": (_DEVICE, _PAGE, 0),
    "device_offline": (_DEVICE, _PAGE, 0),
    "__register_one_node": (_DEVICE, _PAGE, 0),
    "unregister_one_node": (_DEVICE, _PAGE, 0),
    "kswapd_run": (_DEVICE, _PAGE, 0),
    "kcompactd_run": (_DEVICE, _PAGE, 0),
    "kswapd_stop": (_DEVICE, _PAGE, 0),
    "kcompactd_stop": (_DEVICE, _PAGE, 0),
    "register_memory_blocks_under_node": (DEFAULT, _SECTION, 1_000),
    "drain_all_pages": (_ALL_CPUS, _PAGE, 0),
    "__drain_all_pages": (_ALL_CPUS, _PAGE, 0),
    "zone_pcp_disable": (_ALL_CPUS, _PAGE, 0),
    "lru_cache_disable": (_GRACE_PERIOD, _PAGE, 0),
}


def cost(name: str, times: int, pages: int) -> int:
    """Return what calls of a function cost by themselves, without the functions that they call.

    :param name: a kernel function; times: calls; pages: pages that they were about together.
    :return: virtual ns.
    """
    own, unit, each = COSTS.get(name, (DEFAULT, _PAGE, 0))
    return own * times + each * -(-pages // unit)
