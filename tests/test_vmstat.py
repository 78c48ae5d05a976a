"""Counters, and that all files show the same of them."""

from __future__ import annotations

import re

import pytest

from kmm import GFP_HIGHUSER_MOVABLE, GFP_KERNEL, ConfigError, Machine
from kmm.memory import User
from kmm.mempolicy import new_policy
from kmm.replay import snapshot_files
from kmm.vmstat import NUMA_STAT_ITEMS, PagesetWorker
from tests.conftest import DIMM, RECORDINGS, recording, two_nodes

REAL = (RECORDINGS / "vmstat.txt").read_text()
NODE = "/sys/devices/system/node/node%d/"


def table(text: str) -> dict[str, int]:
    return {k: int(n) for k, n in (line.split() for line in text.splitlines())}


def vmstat(m: Machine) -> dict[str, int]:
    return table(m.read("/proc/vmstat"))


def kernel_zone() -> Machine:
    m = two_nodes("memhp_default_state=online_kernel")
    m.plug("a", 1, DIMM, 128 << 20)
    return m


def test_vmstat_has_the_kernels_items_in_its_order(m: Machine) -> None:
    assert "vmstat" in m.listdir("/proc")
    assert list(vmstat(m)) == list(table(REAL))


def test_dirty_thresholds_are_those_of_the_real_machine(m: Machine) -> None:
    """Free pages as in the recorded text; reserves 284 and 16609 marks, 870 for lower zones."""
    shown = table(REAL)
    zone = m.nodes[0].zone(1)
    kept = zone.nr_free_pages, m.totalreserve_pages
    zone.nr_free_pages += shown["nr_free_pages"] - vmstat(m)["nr_free_pages"]
    m.totalreserve_pages = 870 + 284 + 16609
    for name in ("nr_free_pages", "nr_dirty_threshold", "nr_dirty_background_threshold"):
        assert vmstat(m)[name] == shown[name]
    m.write("/proc/sys/vm/dirty_background_ratio", "20")
    assert vmstat(m)["nr_dirty_background_threshold"] == shown["nr_dirty_threshold"] // 2
    zone.nr_free_pages, m.totalreserve_pages = kept
    m.validate()


def test_onlining_frees_pages_and_offlining_counts_nothing() -> None:
    m = two_nodes()
    m.plug("a", 1, DIMM, 128 << 20)
    before = vmstat(m)
    state = f"/sys/devices/system/memory/memory{DIMM >> 27}/state"
    m.write(state, "online_kernel")
    online = vmstat(m)
    assert online["pgfree"] - before["pgfree"] == 32768
    assert online["nr_free_pages"] - before["nr_free_pages"] == 32768
    m.write(state, "offline")
    assert {k: n for k, n in vmstat(m).items() if k.startswith("pg") and n != online[k]} == {}
    m.validate()


def test_a_huge_page_is_one_hit_and_512_pages() -> None:
    """A real kernel's 32 huge pages from a node without CPUs: 16384 pages, 32 hits, 32 other."""
    m = kernel_zone()
    before = vmstat(m)
    pfns = m.alloc_pages_bulk(32, 9, GFP_HIGHUSER_MOVABLE, 1)
    after = vmstat(m)
    changed = {k: after[k] - n for k, n in before.items() if after[k] != n and k != "nr_free_pages"}
    assert {k: n for k, n in changed.items() if not k.startswith("nr_dirty")} == {
        "numa_hit": 32,
        "numa_other": 32,
        "pgalloc_normal": 16384,
    }
    m.free_pages_bulk(pfns, 9)
    assert vmstat(m)["pgfree"] - after["pgfree"] == 16384
    m.validate()


def numa_of_zoneinfo(m: Machine, nid: int) -> dict[str, int]:
    part = "".join(
        re.findall(rf"^Node {nid},.*?(?=^Node|\Z)", m.read("/proc/zoneinfo"), re.M | re.S)
    )
    return {k: sum(map(int, re.findall(rf" {k} +(\d+)", part))) for k in NUMA_STAT_ITEMS}


def test_all_files_count_requests_alike() -> None:
    m = kernel_zone()
    before = vmstat(m)["numa_hit"]
    m.alloc_pages_bulk(40000, 0, GFP_KERNEL, 1)
    m.alloc_pages(0, GFP_KERNEL, 0, cpu=1)
    total = dict.fromkeys(NUMA_STAT_ITEMS, 0)
    for nid in (0, 1):
        want = numa_of_zoneinfo(m, nid)
        assert {k: table(m.read(NODE % nid + "vmstat"))[k] for k in want} == want
        assert list(table(m.read(NODE % nid + "numastat")).values()) == list(want.values())
        total = {k: total[k] + n for k, n in want.items()}
    assert {k: vmstat(m)[k] for k in total} == total
    assert total["numa_hit"] + total["numa_miss"] == before + 40001
    assert total["numa_miss"] == total["numa_foreign"] > 0
    m.validate()


def test_a_machine_from_files_counts_on() -> None:
    files = recording("kernel_zone")["steps"][-1]["files"]
    m = Machine.from_files({**files, "/proc/vmstat": REAL})
    shown, real = vmstat(m), table(REAL)
    for name in ("pgalloc_dma32", "pgfree", "pgfault", "thp_scan_exceed_none_pte"):
        assert shown[name] == real[name]
    zones = files["/proc/zoneinfo"]
    hits = sum(map(int, re.findall(r"numa_hit +(\d+)", zones)))
    interleaved = sum(map(int, re.findall(r"numa_interleave +(\d+)", zones)))
    assert hits > 0
    assert interleaved > 0
    assert (shown["numa_hit"], shown["numa_interleave"]) == (hits, interleaved)
    assert snapshot_files(m)["/proc/zoneinfo"].count("numa_hit") == zones.count("numa_hit")
    m.free_pages(m.alloc_pages(3), 3)
    later = vmstat(m)
    assert later["numa_hit"] == hits + 1
    assert later["pgfree"] == real["pgfree"] + 8
    m.validate()


@pytest.mark.parametrize("value", ["-1", "9223372036854775808", "many", "", "1 2", "٣"])
def test_a_count_that_is_none_is_named(value: str) -> None:
    files = recording("movable_node")["steps"][0]["files"]
    with pytest.raises(ConfigError, match=r"/proc/vmstat: pgfree .*; allowed: a number from 0 to"):
        Machine.from_files({**files, "/proc/vmstat": f"unknown 7\npgfree {value}\n"})


def test_counts_wrap_as_the_kernels_do() -> None:
    m = kernel_zone()
    zone = m.nodes[1].zone(2)
    zone.vm_events = {"numa_hit": (1 << 63) - 1}
    m.alloc_pages(nid=1)
    assert numa_of_zoneinfo(m, 1)["numa_hit"] == 1 << 63
    with pytest.raises(ValueError, match="numa_guess"):
        zone.vm_events = {"numa_guess": 1}
    m.validate()


def test_the_worker_gives_back_a_batch_that_a_cpu_of_another_node_left_alone() -> None:
    m = two_nodes("memhp_default_state=online_movable")
    m.plug("a", 1, DIMM, 128 << 20)
    worker = PagesetWorker(m)
    User(m, "hog", "shmem", 100, policy=new_policy(m, "bind", [1])).fault(0, 100)
    zone = next(z for z in m.nodes[1].zones if z.populated)
    kept, _, batch, _ = zone.pcp_state(0)
    assert 0 < kept < batch
    worker.look()
    worker.wait(2.0)
    assert zone.pcp_state(0)[0] == kept
    worker.wait(1.0)
    assert zone.pcp_state(0)[0] == 0
    m.validate()
