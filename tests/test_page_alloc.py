"""Whole requests: zones, watermarks, reserves, CPUs, many at once."""

from __future__ import annotations

import errno
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmm import (
    GFP_ATOMIC,
    GFP_HIGHUSER_MOVABLE,
    GFP_KERNEL,
    GFP_NOWAIT,
    KernelError,
    Machine,
    MachineConfig,
    page_alloc,
)
from kmm.compaction import COMPACT_SKIPPED
from kmm.errors import kernel_error
from kmm.gfp import __GFP_DMA, __GFP_DMA32, __GFP_RECLAIMABLE, __GFP_THISNODE
from kmm.mmzone import Zone
from kmm.page_alloc import drain_all_pages
from kmm.snapshot import dump, dump_zone
from tests.conftest import DIMM, two_nodes

SECTION = 1 << 27


def machine(memory: str = "1G", blocks: tuple[str, ...] = ("online_kernel",)) -> Machine:
    """Two CPUs on node 0; node 1 has nothing but hot-added blocks."""
    config = {
        "memory": memory,
        "maxmem": "64G",
        "cpus": 2,
        "nodes": [{"cpus": "0-1", "memory": memory}, {}],
    }
    m = Machine(MachineConfig.from_dict(config))
    for i, how in enumerate(blocks):
        start = (1 << 33) + i * SECTION
        m.plug(f"d{i}", 1, start, SECTION)
        m.write(f"/sys/devices/system/memory/memory{start // SECTION}/state", how)
    return m


def zone_of(m: Machine, pfn: int) -> Zone:
    zone = m.page_zone(pfn)
    assert zone is not None
    return zone


# -- which zone ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gfp", "name"),
    [
        (GFP_KERNEL, "Normal"),
        (GFP_HIGHUSER_MOVABLE, "Movable"),
        (GFP_KERNEL | 0x8, "Normal"),  # movable without highmem stays below Movable
        (GFP_KERNEL | 0x2, "Normal"),  # highmem alone too
    ],
)
def test_gfp_chooses_the_zone(gfp: int, name: str) -> None:
    m = machine(blocks=("online_kernel", "online_movable"))
    pfn = m.alloc_pages(0, gfp | __GFP_THISNODE, 1)
    assert (zone_of(m, pfn).nid, zone_of(m, pfn).name) == (1, name)
    m.validate()


@pytest.mark.parametrize(("bit", "name"), [(__GFP_DMA, "DMA"), (__GFP_DMA32, "DMA32")])
def test_gfp_asks_for_low_memory(bit: int, name: str) -> None:
    m = machine("5G")
    assert zone_of(m, m.alloc_pages(0, GFP_KERNEL)).name == "Normal"
    assert zone_of(m, m.alloc_pages(0, GFP_KERNEL | bit)).name == name
    m.validate()


def test_a_node_without_room_falls_back_and_is_counted() -> None:
    m = machine()
    mine = m.nodes[1].zone(2)
    got = m.alloc_pages_bulk(32768, 0, GFP_KERNEL, 1)
    away = [p for p in got.tolist() if zone_of(m, p) is not mine]
    assert away
    events = mine.vm_events
    assert events["numa_foreign"] == len(away)
    assert events["numa_hit"] == len(got) - len(away)
    assert events["numa_local"] == 0  # no CPU of that node asked
    assert sum(z.vm_events["numa_miss"] for z in m.nodes[0].zones) == len(away)
    m.validate()


def test_thisnode_stays_or_fails() -> None:
    m = machine()
    got = m.alloc_pages_bulk(40000, 0, GFP_KERNEL | __GFP_THISNODE, 1)
    assert {zone_of(m, p).nid for p in got[::500].tolist()} == {1}
    before = dump(m)
    with pytest.raises(KernelError) as e:
        m.alloc_pages(0, GFP_KERNEL | __GFP_THISNODE, 1)
    assert e.value.errno == errno.ENOMEM
    assert dump(m) == before
    m.validate()


# -- watermarks and reserves ----------------------------------------------------------------


def exhaust(m: Machine, gfp: int) -> int:
    """Allocate single pages of node 1 until none is had; how many free pages remain."""
    zone = m.nodes[1].zone(2)
    with pytest.raises(KernelError):
        while True:
            m.alloc_pages(0, gfp | __GFP_THISNODE, 1)
    return zone.nr_free_pages


def test_rights_decide_how_far_a_zone_is_emptied() -> None:
    """Down to min for a patient request, half of it with __GFP_HIGH, a quarter less if atomic."""
    m = machine()
    zone = m.nodes[1].zone(2)
    low = zone.watermark_min + zone.watermark_boost
    for gfp, mark in (
        (GFP_NOWAIT & ~0x800, low),
        (GFP_KERNEL | 0x20, low - low // 2),
        (GFP_ATOMIC, low - low // 2 - (low - low // 2) // 4),
    ):
        free = exhaust(m, gfp)
        # A CPU's list is filled by the batch, the last of which starts above the mark.
        assert mark - zone.pageset_batch < free <= mark
    m.validate()


def test_a_low_zone_wakes_kswapd_and_says_for_what() -> None:
    m = machine()
    assert m.memmap_engine.kswapd_state(1) == (0, -1, 0)
    exhaust(m, GFP_NOWAIT)
    times, order, highest = m.memmap_engine.kswapd_state(1)
    assert times > 0
    assert (order, highest) == (0, 2)
    m.validate()


def test_low_zones_keep_a_reserve_from_those_who_could_go_higher() -> None:
    m = machine("5G")
    dma32 = m.nodes[0].zone(1)
    m.alloc_pages_bulk(1 << 22, 0, GFP_KERNEL | __GFP_THISNODE, 0)
    kept = dma32.nr_free_pages
    assert kept > dma32.watermark_min + dma32.lowmem_reserve[2] - dma32.pageset_batch
    assert dma32.lowmem_reserve[2] > 0
    m.alloc_pages_bulk(1 << 22, 0, GFP_KERNEL | __GFP_DMA32 | __GFP_THISNODE, 0)
    assert dma32.nr_free_pages < kept
    m.validate()


def test_atomic_requests_keep_a_pageblock_for_others_like_them() -> None:
    m = machine()
    zone = m.nodes[1].zone(2)
    held = m.alloc_pages_bulk(40000, 0, GFP_KERNEL | __GFP_THISNODE, 1)
    m.free_pages_bulk(held[-16:][::-1])
    zone.drain()
    pfn = m.alloc_pages(1, GFP_ATOMIC | __GFP_THISNODE, 1)
    assert zone.nr_reserved_highatomic == 512
    assert m.memmap_engine.get_pageblock_migratetype(pfn) == 3
    m.validate()
    m.free_pages(pfn, 1)
    m.free_pages_bulk(held[:-16])
    zone.drain()
    m.validate()


# -- CPUs -----------------------------------------------------------------------------------


def test_each_cpu_has_lists_of_its_own() -> None:
    m = machine()
    zone = m.nodes[1].zone(2)
    first = m.alloc_pages(nid=1, cpu=0)
    second = m.alloc_pages(nid=1, cpu=1)
    assert second == first + zone.pageset_batch
    m.free_pages(first, cpu=1)
    assert zone.pcp_list(1, 0)[0] == first
    assert m.alloc_pages(nid=1, cpu=1) == first
    for call in (lambda: m.alloc_pages(cpu=2), lambda: m.free_pages(first, cpu=-1)):
        with pytest.raises(KernelError, match=r"cpu: -?\d; allowed: a number from 0 to 1"):
            call()
    m.validate()


# -- splitting a block ------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 3, 8, 9, 10])
def test_split_page_makes_single_pages(order: int) -> None:
    m = machine()
    zone = m.nodes[1].zone(2)
    pfn = m.alloc_pages(order, GFP_KERNEL, 1)
    m.split_page(pfn, order)
    m.validate()
    with pytest.raises(KernelError, match="order"):
        m.free_pages(pfn, order)
    m.free_pages_bulk(np.arange(pfn, pfn + (1 << order), dtype=np.uint64))
    zone.drain()
    assert zone.nr_free_pages == zone.managed_pages
    assert zone.nr_free()[10] == 32
    m.validate()


# -- many at once ---------------------------------------------------------------------------------

GFPS = [
    GFP_KERNEL,
    GFP_KERNEL | __GFP_RECLAIMABLE,
    GFP_HIGHUSER_MOVABLE,
    GFP_KERNEL | __GFP_DMA32,
    GFP_ATOMIC,
    GFP_NOWAIT,
    GFP_KERNEL | __GFP_THISNODE,
    GFP_HIGHUSER_MOVABLE | __GFP_THISNODE,
]


def singly(m: Machine, n: int, **kw: Any) -> list[int]:
    """What single calls give, one after the other."""
    out = []
    for _ in range(n):
        try:
            out.append(m.alloc_pages(**kw))
        except KernelError:
            break
    return out


def assert_same(a: Machine, b: Machine) -> None:
    for za, zb in zip(a.all_zones(), b.all_zones(), strict=True):
        assert dump_zone(za) == dump_zone(zb)
        assert za.vm_events == zb.vm_events
    assert a.memmap_engine.kswapd_state(1) == b.memmap_engine.kswapd_state(1)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    memory=st.sampled_from(["1G", "5G"]),
    blocks=st.lists(st.sampled_from(["online_kernel", "online_movable"]), min_size=1, max_size=3),
)
def test_a_bulk_call_is_its_single_calls(seed: int, memory: str, blocks: list[str]) -> None:
    a, b = machine(memory, tuple(blocks)), machine(memory, tuple(blocks))
    rng = random.Random(seed)
    live: dict[int, list[int]] = {}
    for _ in range(12):
        cpu = rng.randrange(2)
        if rng.random() < 0.6 or not live:
            order = rng.choice([0, 0, 0, 0, 1, 2, 3, 4, 7, 9, 10])
            n = max(1, rng.choice([1, 5, 63, 64, 200, 2000, 20000]) >> order)
            ask: dict[str, Any] = {
                "order": order,
                "gfp": rng.choice(GFPS),
                "nid": rng.randrange(2),
                "cpu": cpu,
            }
            got = a.alloc_pages_bulk(n, **ask).tolist()
            assert got == singly(b, n, **ask)
            if got:
                live.setdefault(order, []).extend(got)
        else:
            order = rng.choice(sorted(live))
            pool = live.pop(order)
            way = rng.random()
            if way < 0.4:
                rng.shuffle(pool)
            elif way < 0.8:  # as release_pages frees: groups from their last on
                group = rng.choice([15, 510, len(pool)])
                pool = [p for i in range(0, len(pool), group) for p in pool[i : i + group][::-1]]
            count = rng.randint(1, len(pool))
            if pool[count:]:
                live[order] = pool[count:]
            a.free_pages_bulk(np.array(pool[:count], dtype=np.uint64), order, cpu=cpu)
            for pfn in pool[:count]:
                b.free_pages(pfn, order, cpu=cpu)
        assert_same(a, b)
    a.validate()
    b.validate()


def test_a_refused_bulk_free_changes_nothing_wherever_the_fault_is() -> None:
    m = machine()
    pfns = m.alloc_pages_bulk(3000, 0, GFP_KERNEL, 1)
    before = dump(m)
    for at in (0, 1, 1500, 2999):
        for bad in (int(pfns[at - 1]) if at else 1 << 33, 1 << 40, int(pfns[5]) + 20000):
            wrong = pfns.copy()
            wrong[at] = bad
            with pytest.raises(KernelError, match=rf"index {at}\)"):
                m.free_pages_bulk(wrong)
            assert dump(m) == before
    m.free_pages_bulk(pfns)
    m.validate()


def test_numbers_of_any_kind_can_be_freed_in_bulk() -> None:
    m = two_nodes()
    m.plug("a", 1, DIMM, SECTION)
    m.write(f"/sys/devices/system/memory/memory{DIMM // SECTION}/state", "online_kernel")
    pfns = m.alloc_pages_bulk(4, nid=1)
    m.free_pages_bulk([pfns[0], int(pfns[1])])
    m.free_pages_bulk(tuple(pfns[2:].tolist()))
    m.free_pages_bulk([])
    assert m.nodes[1].zone(2).pcp_pages() == m.nodes[1].zone(2).pageset_batch
    m.validate()


def test_records_of_large_free_areas_go_back_to_the_host() -> None:
    m = machine("5G")
    zone = m.nodes[0].zone(2)
    m._attach(m.memmap_engine, 16)
    pfns = m.alloc_pages_bulk(100_000)
    assert zone.nr_dirty_free == 0
    m.free_pages_bulk(pfns)
    drain_all_pages(m)
    assert zone.nr_dirty_free <= 16
    first = int(pfns[0]) & ~1023
    assert not m.page_states[first : first + 50_000].any()
    m.validate()


def test_who_waits_asks_compaction_and_reclaim_in_that_order() -> None:
    m = machine()
    kept = m.alloc_pages_bulk(40, 10, GFP_KERNEL | __GFP_THISNODE, 1)
    asked: list[str] = []

    def compact(m: Machine, nid: int, order: int, *others: int) -> tuple[int, int]:
        asked.append(f"compact {order}")
        return COMPACT_SKIPPED, -1

    def reclaim(m: Machine, nid: int, order: int, *others: int) -> int:
        asked.append(f"reclaim {order}")
        m.free_pages_bulk(kept[:1], 10)
        return 1024

    m.ops.try_to_compact_pages, m.ops.try_to_free_pages = compact, reclaim
    want = GFP_KERNEL | __GFP_THISNODE
    while m.alloc_pages(3, want, 1) and not asked:
        pass
    assert asked == ["compact 3", "reclaim 3"]
    asked.clear()
    m.ops.try_to_free_pages = lambda *request: 0
    with pytest.raises(KernelError):
        while True:
            m.alloc_pages(0, want, 1)
    asked.clear()
    with pytest.raises(KernelError):
        while True:
            m.alloc_pages(3, GFP_NOWAIT | __GFP_THISNODE, 1)
    assert asked == []
    m.validate()


def test_requests_larger_than_the_host_are_answered() -> None:
    m = machine()
    got = m.alloc_pages_bulk(1 << 34)
    assert 0 < len(got) < 1 << 20
    m.free_pages_bulk(got)
    with pytest.raises(KernelError, match="pfns: None"):
        m.free_pages_bulk(None)  # type: ignore[arg-type]
    with pytest.raises(KernelError, match=r"split of pfn 0x5, order 2"):
        m.split_page(5, 2)
    for pfn, count in (("a", 1), (1, -4), (1, 1 << 50)):
        with pytest.raises(KernelError, match="allowed"):
            m.free_contig_range(pfn, count)  # type: ignore[arg-type]
    m.validate()


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("gfp", (-1, 0, 0)),
        ("gfp", (1 << 40, 0, 0)),
        ("gfp", ("GFP_KERNEL", 0, 0)),
        ("gfp", (GFP_KERNEL | 0x18, 0, 0)),
        ("order", (GFP_KERNEL, 11, 0)),
        ("order", (GFP_KERNEL, 10**5000, 0)),
        ("nid", (GFP_KERNEL, 0, 2)),
        ("nodemask", (GFP_KERNEL, 0, 0, [-1])),
        ("nodemask", (GFP_KERNEL, 0, 0, [64])),
        ("cpu", (GFP_KERNEL, 0, 0, None, 2)),
        ("cpu", (GFP_KERNEL, 0, 0, None, -1)),
    ],
)
def test_a_request_that_nobody_could_make_is_refused(name: str, args: tuple[Any, ...]) -> None:
    m = machine()
    m.alloc_pages(1)
    before = dump(m)
    with pytest.raises(KernelError, match=f"{name}: .*allowed: ") as e:
        page_alloc.__alloc_pages(m, *args)
    assert e.value.errno == errno.EINVAL
    assert dump(m) == before
    m.validate()


@pytest.mark.parametrize(
    ("name", "args"),
    [("pfn", (-1, 0)), ("order", (0, 11)), ("order", (0, -1)), ("cpu", (0, 0, 2))],
)
def test_a_free_that_nobody_could_make_is_refused(name: str, args: tuple[Any, ...]) -> None:
    m = machine()
    with pytest.raises(KernelError, match=f"{name}: .*allowed: ") as e:
        page_alloc.__free_pages(m, *args)
    assert e.value.errno == errno.EINVAL


def test_what_a_failed_chain_freed_is_not_given_back_to_the_host() -> None:
    m = machine()
    kept, freed = np.split(m.alloc_pages_bulk(100_000), [1])
    freed, rest = freed[::700], np.delete(freed, slice(None, None, 700))
    m.free_pages_bulk(np.random.default_rng(1).permutation(rest))
    m._attach(m.memmap_engine, 4)
    before = dump(m)
    with pytest.raises(KernelError), page_alloc.allocator_undo(m):
        m.free_pages_bulk(freed)
        page_alloc.drain_all_pages(m)
        m.alloc_pages_bulk(1 << 20)
        raise kernel_error(-errno.ENOMEM)
    assert dump(m) == before
    m.validate()
    m.free_pages_bulk(np.append(kept, freed))
    m.validate()


def test_a_failed_chain_wakes_nobody() -> None:
    m = machine()
    before = m.memmap_engine.kswapd_state(1)
    with pytest.raises(KernelError), page_alloc.allocator_undo(m):
        exhaust(m, GFP_KERNEL)
        raise kernel_error(-errno.ENOMEM)
    assert m.memmap_engine.kswapd_state(1) == before
    m.validate()


def test_a_failure_that_was_ordered_ends_a_bulk_request_with_what_there_was() -> None:
    m = machine()
    m.trace().fail("__alloc_pages", -errno.EIO)
    managed = sum(z.managed_pages for z in m.all_zones())
    got = m.alloc_pages_bulk(managed)
    assert 0 < len(got) < managed
    assert not m.kprobes.pending()
    m.free_pages_bulk(got)
    m.validate()
