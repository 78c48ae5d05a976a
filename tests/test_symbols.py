"""Every name, today's and older ones, leads to a function; chains print in both vocabularies."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest

from kmm import GFP_KERNEL, KernelError, Machine, compaction
from kmm import memory_hotplug as mh
from kmm.balloon_compaction import Balloon
from kmm.contig_alloc import alloc_contig_pages
from kmm.hugetlbfs import HugetlbUser
from kmm.kswapd import wakeup_kswapd
from kmm.memory import User
from kmm.memory_group import memory_group_register_dynamic
from kmm.mempolicy import new_policy
from kmm.page_alloc import ALL_NODES
from kmm.symbols import OLDER, RESOLVES, SYMBOLS, TRACEABLE, display, resolve
from kmm.sysfs_hugetlb import HUGEPAGES
from kmm.trace import visible_calls
from kmm.views import call_tree
from kmm.vmscan import try_to_free_pages
from tests.conftest import DIMM, recording, two_nodes

BLOCK = 128 << 20
MEMORY = "/sys/devices/system/memory"

OLDER_NAMES = """hotadd_new_pgdat free_area_init_node __add_section sparse_add_one_section
    sparse_remove_one_section __add_zone memmap_init_zone register_new_memory grow_zone_span
    grow_pgdat_span online_page find_next_system_ram setup_per_zone_pages_min
    memory_probe_store acpi_memory_device_add_memory release_memory_resource
    vm_total_pages""".split()
SAME = """node_set_online cpuset_track_online_nodes __register_one_node kswapd_run
    writeback_set_ratelimit init_currently_empty_zone register_memory_resource arch_add_memory
    __add_pages online_pages offline_pages build_all_zonelists try_to_free_pages wakeup_kswapd
    add_memory __add_memory add_pages nr_free_pagecache_pages""".split()


def test_names_are_listed_once() -> None:
    names = [s.name for s in SYMBOLS]
    assert len(set(names)) == len(names)
    assert {s.status for s in SYMBOLS} <= {"faithful", "adapted", "stub", "renamed"}
    assert all(s.note for s in SYMBOLS if s.status == "adapted")


@pytest.mark.parametrize("symbol", SYMBOLS, ids=lambda s: s.name)
def test_a_symbol_is_where_the_table_says(symbol) -> None:
    if symbol.module.startswith("_"):
        return  # the engine does it, under a name of its own
    module = importlib.import_module(f"kmm.{symbol.module}")
    function = getattr(module, symbol.name, None)
    assert callable(function), f"{symbol.module}.{symbol.name}"
    assert function.__doc__
    for old in symbol.older:
        if old != "release_memory_resource":  # remains a function of its own
            assert getattr(module, old) is function


@pytest.mark.parametrize("name", OLDER_NAMES)
def test_older_names_resolve(name: str) -> None:
    assert name in RESOLVES
    assert resolve(name) in {s.name for s in SYMBOLS}


@pytest.mark.parametrize("name", SAME)
def test_names_that_stayed_are_listed(name: str) -> None:
    assert resolve(name) == name
    assert name in {s.name for s in SYMBOLS}


def test_both_vocabularies() -> None:
    assert display("hotadd_init_pgdat", "old") == "hotadd_new_pgdat"
    assert display("hotadd_init_pgdat", "6.1") == "hotadd_init_pgdat"
    assert all(resolve(old) == new for new, old in OLDER.items())


def test_every_recorded_function_is_known() -> None:
    seen = {
        call[1]
        for name in ("movable_node", "auto_online", "memmap_on_memory", "probe", "veto")
        for step in recording(name)["steps"]
        for call in step.get("calls", [])
    }
    assert seen <= TRACEABLE


def chains() -> list[list[object]]:
    """Record every chain that the table knows of, from its door or from the first caller."""
    calls: list[list[object]] = []

    def play(act: Callable[[Machine], object], **config: Any) -> None:
        m = two_nodes(**config)
        probes = m.trace()
        act(m)
        m.kprobes = None
        m.validate()
        calls.extend(probes.calls)

    def comes_and_goes(m: Machine) -> None:
        m.plug("a", 1, DIMM, BLOCK)
        m.write(f"{MEMORY}/memory32/state", "online_movable")
        m.free_pages(m.alloc_pages())
        user = User(m, "user", "anon", 100, policy=new_policy(m, "bind", [1]))
        user.grow(100)
        m.dump_page(int(user.pfns()[0]), "unmovable page")
        m.unpin(m.pin(user, 3))
        m.write(f"{MEMORY}/soft_offline_page", hex(int(user.pfns()[5]) << 12))
        m.write(f"{MEMORY}/hard_offline_page", hex(int(user.pfns()[6]) << 12))
        Balloon(m, "balloon", 10).inflate(10)
        m.free_contig_range(alloc_contig_pages(m, 600, GFP_KERNEL, 1), 600)
        huge_pages_come_and_go(m)
        m.write(f"{MEMORY}/soft_offline_page", hex(DIMM + (64 << 20)))
        m.write(f"{MEMORY}/hard_offline_page", hex(DIMM + (65 << 20)))
        m.unplug("a")
        user.close()

    def huge_pages_come_and_go(m: Machine) -> None:
        m.write(f"{HUGEPAGES}/hugepages-2048kB/nr_hugepages", "10")
        file = HugetlbUser(m, "file", 2, policy=new_policy(m, "bind", [1]))
        file.fault(0, 1)
        user = int(file.pfns()[0])
        free = next(iter(m.default_hstate.free[1]))
        # The used page goes to a free one of the pool and is itself free, and in the way, then.
        with pytest.raises(KernelError):
            m.alloc_contig_range(user, user + 512)
        m.alloc_contig_range(free, free + 512)
        m.free_contig_range(free, 512)
        file.close()

    def gigantic(m: Machine) -> None:
        m.plug("a", 1, DIMM, 1 << 30)
        m.write(f"{HUGEPAGES}/hugepages-1048576kB/nr_hugepages", "1")
        m.write(f"{HUGEPAGES}/hugepages-1048576kB/demote", "1")

    def compacts(m: Machine) -> None:
        m.plug("a", 1, DIMM, BLOCK)
        m.write(f"{MEMORY}/memory32/state", "online_movable")
        m.write("/proc/sys/vm/compact_memory", "1")
        compaction.try_to_compact_pages(m, 1, 9, GFP_KERNEL)
        compaction.proactive_compact_node(m, 1)
        compaction.kcompactd_do_work(m, 1)

    def by_callers(m: Machine) -> None:
        mh.add_memory(m, 1, DIMM, BLOCK)
        m.write(f"{MEMORY}/memory32/online", "1")
        mh.offline_and_remove_memory(m, DIMM, BLOCK)
        mh.add_memory_driver_managed(m, 1, DIMM, BLOCK, "System RAM (kmem)")
        mh.remove_memory(m, DIMM, BLOCK)
        with pytest.raises(KernelError):
            mh.add_memory(m, 1, DIMM, 4096)
        memory_group_register_dynamic(m, 1, m.block_pages)
        m.write(f"{MEMORY}/probe", f"{DIMM:#x}")

    def runs_short(m: Machine) -> None:
        m.swapon(1 << 20)
        file, task = User(m, "file", "file", 200_000), User(m, "task", "anon", 200_000)
        slab = User(m, "slab", "slab_reclaimable", 500)
        slab.fault(0, 500)
        file.write(0, 100)
        assert try_to_free_pages(m, 0, 0, GFP_KERNEL, ALL_NODES, 0) > 0
        file.write(0, 60_000)
        m.sync()
        m.write("/proc/sys/vm/drop_caches", "3")
        task.fault(0, 60_000)
        file.read(0, 200_000)
        wakeup_kswapd(m, m.nodes[0].zone(1), 0, 1)
        with pytest.raises(KernelError):
            while True:
                m.alloc_pages(3)
        with pytest.raises(KernelError):
            while True:
                m.alloc_pages(9, GFP_KERNEL | 0x4000)
        m.ops.try_to_free_pages = lambda *request: 1
        with pytest.raises(KernelError):
            while True:
                m.alloc_pages(10, GFP_KERNEL | 0x4000)

    def changes_drivers(m: Machine) -> None:
        for file in ("device_dax/unbind", "kmem/new_id", "kmem/unbind"):
            m.write(f"/sys/bus/dax/drivers/{file}", "dax0.0")

    play(comes_and_goes)
    play(changes_drivers, nodes=[{"memory": "1G", "soft_reserved": "128M"}])
    play(runs_short)
    play(comes_and_goes, cmdline="memhp_default_state=offline memory_hotplug.memmap_on_memory=1")
    play(by_callers)
    play(compacts)
    play(gigantic, cmdline="memhp_default_state=online_kernel")
    return calls


def test_every_function_of_the_chains_is_recorded_under_both_names() -> None:
    """All that stands in the table is called."""
    calls = chains()
    recorded = {str(name) for _, name, _ in calls}
    listed = {s.name for s in SYMBOLS if s.status != "renamed"}
    assert listed <= recorded
    for vocabulary in ("6.1", "old"):
        text = call_tree(calls, vocabulary)
        for name in listed:
            assert f" {display(name, vocabulary)}()" in text
    for old in ("grow_zone_span", "grow_pgdat_span", "memory_probe_store", "memmap_init_zone"):
        assert f" {old}()" in text
    assert " acpi_memory_device_add_memory()" in text


def test_a_chain_is_recorded_with_callers(m: Machine) -> None:
    probes = m.trace()
    m.plug("a", 1, DIMM, 128 << 20)
    text = call_tree(probes.calls)
    assert "acpi_device_hotplug()" in text
    assert "sparse_add_section()" in text
    hidden = visible_calls(probes.calls, TRACEABLE)
    assert "sparse_add_section" not in {name for _, name, _ in hidden}
    m.kprobes = None
    count = len(probes.calls)
    m.write("/sys/devices/system/memory/memory32/online", "1")
    assert len(probes.calls) == count
    m.validate()


def test_hidden_callers_hand_their_callees_up() -> None:
    calls = [
        [0, "a", 1],
        [1, "x", 1],
        [2, "b", 2],
        [1, "b", 1],
        [2, "c", 1],
        [0, "x", 1],
        [1, "d", 1],
    ]
    assert visible_calls(calls, {"a", "b", "c", "d"}) == [
        [0, "a", 1],
        [1, "b", 3],
        [2, "c", 1],
        [0, "d", 1],
    ]
