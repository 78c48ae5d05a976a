"""The kernel functions that kmm models: file, status, older names, and what a tracer sees."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Symbol:
    """One kernel function.

    ``status`` is faithful, adapted, stub or renamed (an older name); ``traceable`` says whether
    the recorded chains of the reference build (Debian's 6.1.192 for amd64) show it: not what is
    inlined or bars tracing, nor what was not asked for.
    """

    name: str
    file: str
    module: str
    status: str = "faithful"
    traceable: bool = True
    note: str = ""
    older: tuple[str, ...] = ()


def _rows(file: str, module: str, names: str, **kw: object) -> list[Symbol]:
    return [Symbol(n, file, module, **kw) for n in names.split()]  # type: ignore[arg-type]


_HOTPLUG, _ALLOC = "mm/memory_hotplug.c", "mm/page_alloc.c"

SYMBOLS: tuple[Symbol, ...] = (
    *_rows("drivers/acpi/scan.c", "acpi_scan", "acpi_device_hotplug acpi_bus_attach"),
    *_rows("drivers/acpi/acpi_memhotplug.c", "acpi_memhotplug", "acpi_memory_device_remove"),
    Symbol("acpi_memory_device_add", "drivers/acpi/acpi_memhotplug.c", "acpi_memhotplug"),
    Symbol(
        "acpi_memory_enable_device",
        "drivers/acpi/acpi_memhotplug.c",
        "acpi_memhotplug",
        traceable=False,
        older=("acpi_memory_device_add_memory",),
        note="inlined; the older drawing gives its loop over ranges a name of its own",
    ),
    *_rows(
        "drivers/dax/kmem.c",
        "dax_kmem",
        "dev_dax_kmem_probe dev_dax_kmem_remove",
        traceable=False,
    ),
    *_rows(
        "drivers/acpi/scan.c",
        "acpi_scan",
        "acpi_generic_hotplug_event acpi_scan_hot_remove acpi_scan_try_to_offline acpi_bus_trim",
        traceable=False,
    ),
    Symbol(
        "probe_store",
        "drivers/base/memory.c",
        "sysfs_memory",
        traceable=False,
        older=("memory_probe_store",),
        note="the word 'add' is taken if the machine says so",
    ),
    *_rows(
        "drivers/base/memory.c",
        "memory_block",
        "memory_subsys_online memory_subsys_offline memory_notify walk_memory_blocks "
        "remove_memory_block_devices add_memory_block",
    ),
    *_rows("drivers/base/core.c", "memory_block", "device_online device_offline", traceable=False),
    *_rows(
        "drivers/base/memory.c",
        "memory_block",
        "state_store memory_block_change_state remove_memory_block",
        traceable=False,
    ),
    Symbol(
        "create_memory_block_devices",
        "drivers/base/memory.c",
        "memory_block",
        older=("register_new_memory",),
    ),
    *_rows(
        "drivers/base/memory.c",
        "memory_group",
        "memory_group_register_static memory_group_register_dynamic memory_group_unregister",
    ),
    *_rows(
        "drivers/base/memory.c",
        "memory_hotplug",
        "memory_block_online memory_block_offline",
        traceable=False,
        note="the mechanism that holds the block devices reaches them through Machine.ops",
    ),
    *_rows(
        _HOTPLUG,
        "memory_hotplug",
        "check_hotplug_memory_range online_pages_range node_states_check_changes_online "
        "node_states_check_changes_offline shrink_zone_span update_pgdat_span "
        "mhp_init_memmap_on_memory mhp_deinit_memmap_on_memory",
        traceable=False,
    ),
    Symbol("__register_one_node", "drivers/base/node.c", "node", older=("register_one_node",)),
    *_rows("drivers/base/node.c", "node", "unregister_one_node"),
    Symbol("register_memory_blocks_under_node", "drivers/base/node.c", "node", traceable=False),
    Symbol("unregister_memory_block_under_nodes", "drivers/base/node.c", "memory_block"),
    Symbol("add_memory", _HOTPLUG, "memory_hotplug", traceable=False),
    *_rows(
        _HOTPLUG,
        "memory_hotplug",
        "__add_memory register_memory_resource add_memory_resource __try_online_node",
    ),
    Symbol("hotadd_init_pgdat", _HOTPLUG, "memory_hotplug", older=("hotadd_new_pgdat",)),
    Symbol("free_area_init_core_hotplug", _ALLOC, "memory_hotplug", older=("free_area_init_node",)),
    Symbol(
        "__add_pages",
        _HOTPLUG,
        "memory_hotplug",
        "adapted",
        note="sections of an add that fails half way are taken back; the kernel leaks them",
    ),
    Symbol("zone_for_pfn_range", _HOTPLUG, "memory_hotplug"),
    Symbol("move_pfn_range_to_zone", _HOTPLUG, "memory_hotplug", older=("__add_zone",)),
    Symbol(
        "memmap_init_range",
        _ALLOC,
        "memory_hotplug",
        traceable=False,
        older=("memmap_init_zone",),
        note="pages of a fresh range are described per pageblock",
    ),
    Symbol("init_currently_empty_zone", _ALLOC, "memory_hotplug", traceable=False),
    Symbol(
        "resize_zone_range", _HOTPLUG, "memory_hotplug", traceable=False, older=("grow_zone_span",)
    ),
    Symbol(
        "resize_pgdat_range",
        _HOTPLUG,
        "memory_hotplug",
        traceable=False,
        older=("grow_pgdat_span",),
    ),
    *_rows(
        _HOTPLUG,
        "memory_hotplug",
        "online_pages adjust_present_page_count offline_pages remove_pfn_range_from_zone "
        "__remove_memory try_remove_memory __remove_pages try_offline_node",
    ),
    *_rows(
        _HOTPLUG,
        "memory_hotplug",
        "remove_memory offline_and_remove_memory add_memory_driver_managed",
        traceable=False,
    ),
    Symbol(
        "generic_online_page",
        _HOTPLUG,
        "memory_hotplug",
        older=("online_page",),
        note="the engine frees a whole range at a time",
    ),
    Symbol(
        "walk_system_ram_range",
        "kernel/resource.c",
        "memory_hotplug",
        older=("find_next_system_ram",),
    ),
    Symbol(
        "release_mem_region_adjustable",
        "kernel/resource.c",
        "memory_hotplug",
        older=("release_memory_resource",),
        note="the older name remains for undoing a failed add",
    ),
    *_rows("arch/x86/mm/init_64.c", "arch_x86_64", "arch_add_memory add_pages arch_remove_memory"),
    Symbol(
        "init_memory_mapping",
        "arch/x86/mm/init.c",
        "arch_x86_64",
        "stub",
        note="page tables of the direct map cost nothing",
    ),
    Symbol(
        "sparse_add_section",
        "mm/sparse.c",
        "sparse",
        traceable=False,
        older=("__add_section", "sparse_add_one_section"),
    ),
    *_rows("mm/sparse.c", "sparse", "online_mem_sections offline_mem_sections", traceable=False),
    Symbol("sparse_remove_section", "mm/sparse.c", "sparse", older=("sparse_remove_one_section",)),
    Symbol(
        "vmemmap_populate",
        "arch/x86/mm/init_64.c",
        "sparse",
        "adapted",
        traceable=False,
        note="backing pages are taken and counted; there are no page tables to fill",
    ),
    *_rows(_ALLOC, "zonelists", "build_all_zonelists __build_all_zonelists build_zonelists"),
    Symbol("setup_per_zone_wmarks", _ALLOC, "watermarks", older=("setup_per_zone_pages_min",)),
    *_rows(_ALLOC, "watermarks", "setup_per_zone_lowmem_reserve zone_pcp_reset"),
    *_rows(_ALLOC, "watermarks", "init_per_zone_wmark_min setup_zone_pageset", traceable=False),
    Symbol("refresh_zone_stat_thresholds", "mm/vmstat.c", "watermarks", traceable=False),
    *_rows(
        _ALLOC, "page_alloc", "zone_pcp_disable zone_pcp_enable drain_all_pages __drain_all_pages"
    ),
    *_rows(_ALLOC, "page_alloc", "__alloc_pages __free_pages", traceable=False),
    *_rows(
        _ALLOC,
        "contig_alloc",
        "alloc_contig_range",
        status="adapted",
        traceable=False,
        note="where a gigantic page reaches out of the range, nothing is isolated before it fails",
    ),
    *_rows(
        _ALLOC,
        "contig_alloc",
        "__alloc_contig_migrate_range",
        status="adapted",
        traceable=False,
        note="a page that is held goes back to its list between the tries; any signal ends it, "
        "not only a fatal one",
    ),
    *_rows(_ALLOC, "contig_alloc", "alloc_contig_pages free_contig_range", traceable=False),
    Symbol("__offline_isolated_pages", _ALLOC, "memory_hotplug"),
    *_rows(
        "mm/page_isolation.c",
        "page_isolation",
        "start_isolate_page_range undo_isolate_page_range test_pages_isolated",
    ),
    *_rows(
        "mm/page_isolation.c",
        "_scan",
        "isolate_single_pageblock unset_migratetype_isolate",
        note="the engine does a whole range at a time; a gigantic page that crosses the end of the "
        "range is refused, as the kernel cannot move it then either",
    ),
    *_rows(
        "mm/memory-failure.c",
        "memory_failure",
        "soft_offline_page memory_failure get_hwpoison_page",
        status="adapted",
        traceable=False,
        note="nobody is killed at once (as without early kill) or later, when the page is "
        "touched: its slot is empty; huge pages of pools are left alone",
    ),
    *_rows(
        "mm/memory-failure.c",
        "hwpoison_in_use",
        "soft_offline_in_use_page action_result",
        traceable=False,
    ),
    Symbol(
        "pin_user_pages",
        "mm/gup.c",
        "gup",
        "adapted",
        traceable=False,
        note="one page, or the huge page that it is part of, a call; what loses its user while it "
        "is pinned is not counted as on an LRU list any more",
    ),
    Symbol(
        "unpin_user_page",
        "mm/gup.c",
        "gup",
        traceable=False,
    ),
    Symbol("migrate_longterm_unpinnable_pages", "mm/gup.c", "gup", traceable=False),
    Symbol("adjust_managed_page_count", _ALLOC, "balloon_compaction", traceable=False),
    Symbol(
        "dump_page",
        "mm/debug.c",
        "debug",
        "adapted",
        traceable=False,
        note="without pointers, cgroups and raw words; a file's number is its user's",
    ),
    *_rows("mm/sparse.c", "memory_failure", "clear_hwpoisoned_pages", traceable=False),
    Symbol(
        "lru_cache_disable",
        "mm/swap.c",
        "memory_hotplug",
        "adapted",
        note="nothing to drain: pages are on their LRU lists at once, without per-CPU batches",
    ),
    *_rows(_HOTPLUG, "memory_hotplug", "scan_movable_pages", traceable=False),
    Symbol("do_migrate_range", _HOTPLUG, "migrate_range", traceable=False),
    Symbol(
        "isolate_lru_page",
        "mm/vmscan.c",
        "_migrate",
        "adapted",
        note="the engine isolates a whole range; no reference is taken, the page's record says "
        "that it is isolated, and a huge page counts with all its pages",
    ),
    Symbol(
        "migrate_pages",
        "mm/migrate.c",
        "migrate",
        "adapted",
        note="batches, passes and failure kinds are the kernel's, references are marks; a huge "
        "page let go meanwhile counts as one page; compaction has its own round, in which a page "
        "under writeback moves with its mark, as one whose writeback was waited for",
    ),
    Symbol("alloc_migration_target", "mm/migrate.c", "migrate"),
    Symbol("dissolve_free_huge_pages", "mm/hugetlb.c", "hugetlb_move"),
    *_rows(
        "mm/hugetlb.c",
        "hugetlb_move",
        "dissolve_free_huge_page alloc_and_dissolve_huge_page isolate_or_dissolve_huge_page",
        traceable=False,
        note="the memmap of a huge page is never given back (hugetlb_free_vmemmap is off)",
    ),
    Symbol("unmap_and_move_huge_page", "mm/migrate.c", "hugetlb_move", traceable=False),
    *_rows(
        "mm/hugetlb.c",
        "hugetlb",
        "alloc_buddy_huge_page free_huge_page",
        traceable=False,
    ),
    Symbol(
        "alloc_gigantic_page",
        "mm/hugetlb.c",
        "hugetlb",
        "adapted",
        traceable=False,
        note="at boot too, where the kernel asks memblock; hugetlb_cma= is not there (no CMA)",
    ),
    Symbol(
        "set_max_huge_pages",
        "mm/hugetlb.c",
        "hugetlb_pool",
        "adapted",
        traceable=False,
        note="no signal ends it",
    ),
    *_rows(
        "mm/hugetlb.c",
        "hugetlb_pool",
        "hugetlb_acct_memory demote_pool_huge_page",
        traceable=False,
        note="no subpools and cgroups; the task has no policy and cpuset of its own",
    ),
    *_rows("mm/vmscan.c", "node", "kswapd_run kswapd_stop"),
    *_rows("mm/compaction.c", "node", "kcompactd_run kcompactd_stop"),
    Symbol("writeback_set_ratelimit", "mm/page-writeback.c", "watermarks"),
    Symbol("node_set_online", "include/linux/nodemask.h", "node", traceable=False),
    Symbol(
        "cpuset_track_online_nodes",
        "kernel/cgroup/cpuset.c",
        "notifiers",
        "adapted",
        traceable=False,
        note="follows the nodes with memory at once, not from a work queue",
    ),
    Symbol(
        "cpuset_hotplug_workfn",
        "kernel/cgroup/cpuset.c",
        "cpuset",
        "adapted",
        traceable=False,
        note="policies of tasks of the top group are left alone: nodes without memory are passed "
        "over anyway",
    ),
    Symbol(
        "nr_free_pagecache_pages",
        _ALLOC,
        "zonelists",
        "renamed",
        traceable=False,
        older=("vm_total_pages",),
        note="gone in 6.1; build_all_zonelists logs it, Machine.vm_total_pages keeps it",
    ),
    Symbol(
        "try_to_compact_pages",
        "mm/compaction.c",
        "compaction",
        traceable=False,
        note="not inside a chain whose records are kept for undoing",
    ),
    *_rows(
        "mm/compaction.c",
        "compaction",
        "compact_zone",
        status="adapted",
        traceable=False,
        note="where too many pages are isolated a run ends, also a synchronous one; a contended "
        "lock and need_resched never end it; order-0 pages alone are told from compound ones",
    ),
    *_rows("mm/compaction.c", "compaction", "compact_node compact_nodes", traceable=False),
    *_rows(
        "mm/compaction.c",
        "compaction",
        "proactive_compact_node kcompactd_do_work",
        status="adapted",
        traceable=False,
        note="kcompactd works while virtual time passes, and looks once at the end of a wait "
        "however long it was; kswapd never counts as running",
    ),
    Symbol(
        "try_to_free_pages",
        "mm/vmscan.c",
        "vmscan",
        "adapted",
        traceable=False,
        note="one lruvec a node, without memory cgroups; waiting passes virtual time",
    ),
    Symbol(
        "wakeup_kswapd",
        "mm/vmscan.c",
        "kswapd",
        "adapted",
        traceable=False,
        note="the daemon works when the allocating task next lets it, and that task goes on after",
    ),
    Symbol(
        "balance_pgdat",
        "mm/vmscan.c",
        "kswapd",
        "adapted",
        traceable=False,
        note="stat thresholds stay; what the boot files of a real system count as LRU pages cannot "
        "be reclaimed",
    ),
    Symbol(
        "shrink_node",
        "mm/vmscan.c",
        "vmscan",
        "adapted",
        traceable=False,
        note="no executable mappings, buffer heads, demotion and lazily freed pages; no shadow "
        "entries, so that refaults are never seen; pages pass no per-CPU batch on their way to "
        "a list; of a swap device that answers at once nothing stays in the swap cache",
    ),
    Symbol(
        "__alloc_pages_slowpath",
        _ALLOC,
        "page_alloc",
        "adapted",
        traceable=False,
        note="what the kernel would try for ever ends after page_alloc.NOFAIL_LOOPS tries; with "
        "nobody to kill it is refused, where the kernel panics; inside a chain that may have to "
        "be undone nothing is reclaimed, moved or killed; failures are logged without a stack",
    ),
    *_rows(
        _ALLOC,
        "page_alloc",
        "should_reclaim_retry should_compact_retry __alloc_pages_may_oom",
        traceable=False,
    ),
    *_rows(
        "mm/vmscan.c",
        "vmscan",
        "should_continue_reclaim zone_reclaimable_pages allow_direct_reclaim",
        traceable=False,
    ),
    Symbol(
        "throttle_direct_reclaim",
        "mm/vmscan.c",
        "vmscan",
        "adapted",
        traceable=False,
        note="ends after as many tries as make a node hopeless",
    ),
    *_rows("mm/vmscan.c", "kswapd", "pgdat_balanced", traceable=False),
    *_rows(
        "mm/vmscan.c",
        "shrinker",
        "shrink_slab do_shrink_slab",
        status="adapted",
        traceable=False,
        note="an object is a block of pages; caches count and free on all nodes",
    ),
    Symbol(
        "drop_slab",
        "mm/vmscan.c",
        "shrinker",
        traceable=False,
        note="the line that the kernel logs of drop_caches, with the writer's name, is left out",
    ),
    Symbol(
        "balance_dirty_pages",
        "mm/page-writeback.c",
        "page_writeback",
        "adapted",
        traceable=False,
        note="one backing store; the limits are the kernel's, pauses end when a writeback does; "
        "what is dirty for 30 seconds is not written for that alone",
    ),
    Symbol(
        "wb_writeback",
        "fs/fs-writeback.c",
        "page_writeback",
        "adapted",
        traceable=False,
        note="files in the order in which they became dirty, 1024 pages of each in turn",
    ),
    *_rows("fs/fs-writeback.c", "page_writeback", "wakeup_flusher_threads", traceable=False),
    *_rows(
        "mm/page-writeback.c",
        "_filemap",
        "write_cache_pages",
        status="adapted",
        traceable=False,
        note="the engine writes a whole range",
    ),
    *_rows("mm/truncate.c", "_filemap", "invalidate_mapping_pages", traceable=False),
    Symbol(
        "swapon",
        "mm/swapfile.c",
        "swapfile",
        "adapted",
        traceable=False,
        note="one device, which answers at once and reads nothing ahead; there is no swapoff",
    ),
    Symbol(
        "out_of_memory",
        "mm/oom_kill.c",
        "oom_kill",
        "adapted",
        traceable=False,
        note="tasks are the anonymous users, without page tables and mapped files; a victim's "
        "memory is free at once; the log has no stack",
    ),
    *_rows(
        "mm/oom_kill.c",
        "oom_kill",
        "oom_badness select_bad_process constrained_alloc",
        traceable=False,
    ),
    *_rows(_ALLOC, "show_mem", "warn_alloc", traceable=False),
    *_rows("lib/show_mem.c", "show_mem", "show_mem", traceable=False),
)

#: Functions that a call chain of the reference build shows.
TRACEABLE: set[str] = {s.name for s in SYMBOLS if s.traceable}
#: Older names by their name in 6.1, the first where there are several.
OLDER: dict[str, str] = {s.name: s.older[0] for s in SYMBOLS if s.older and s.status != "renamed"}
#: Names in 6.1 by every older name.
RESOLVES: dict[str, str] = {old: s.name for s in SYMBOLS for old in s.older}

#: What a refused operation leaves behind where a user of the real kernel sees it too.
LEFT_BEHIND: dict[str, str] = {
    "failed eject": "blocks that were taken offline come back by the default policy, perhaps in "
    "another zone",
    "failed offline": "isolated pageblocks are typed Movable; their free blocks come back "
    "at the tails of the lists; the zone's per-CPU lists are drained",
    "failed offline of a block with huge pages": "those that moved stay where they went, and those "
    "that were dissolved are gone from their pool",
    "failed online_movable": "of a block that is online already: the wish stays for the next 1 "
    "written to online",
    "failed hard_offline_page": "of a page that the kernel uses or somebody holds: it is marked "
    "and counts as HardwareCorrupted; its zone's per-CPU lists are drained",
    "failed soft_offline_page": "of a page that the kernel uses: its zone's per-CPU lists are "
    "drained",
    "failed offline that had isolated its block": "what could move has moved",
    "failed ACPI add": "_OST says success",
    "removal of a range that no single resource holds": "its lines stay in /proc/iomem, without "
    "blocks, and nothing can be added there until each is removed by itself",
    "removal of a range of several nodes": "only the last block's node goes offline if it is "
    "empty; another one stays, with its directory, until memory of it is removed again",
    "MEM_ONLINE or MEM_OFFLINE refused before the cpuset's notifier": "the top cpuset's nodes "
    "stay as they were until the next event",
    "max_pfn and policy zone": "never fall",
}


def resolve(name: str) -> str:
    """Return a function's name in 6.1, given that name or an older one."""
    return RESOLVES.get(name, name)


def display(name: str, vocabulary: str) -> str:
    """Return a function's name in a vocabulary, ``old`` or ``6.1``."""
    return OLDER.get(name, name) if vocabulary == "old" else name
