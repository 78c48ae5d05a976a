"""Watermarks and reserves against figures seen on a real kernel."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kmm import Machine, MachineConfig
from kmm.replay import boot_machine, snapshot_files
from kmm.watermarks import (
    init_per_zone_wmark_min,
    set_thp_enabled,
    setup_per_zone_wmarks,
    zone_batchsize,
    zone_highsize,
    zone_set_pageset_high_and_batch,
)
from kmm.zonelists import build_all_zonelists
from tests.conftest import DIMM, recording, two_nodes
from tests.reference import watermark_twin as twin_of
from tests.reference.hotplug_twin import TwinMachine

STATE = "/sys/devices/system/memory/memory%d/state"


@pytest.fixture
def real() -> Machine:
    """The recorded guest of 1 GiB, after its files were read once."""
    m = boot_machine(recording("movable_node"))
    snapshot_files(m)
    return m


def marks(m: Machine, nid: int, idx: int) -> tuple[int, int, int]:
    zone = m.nodes[nid].zone(idx)
    return zone.min_wmark_pages(), zone.low_wmark_pages(), zone.high_wmark_pages()


def test_a_movable_block_shrinks_everybodys_share(real: Machine) -> None:
    assert (marks(real, 0, 0), marks(real, 0, 1)) == ((190, 237, 284), (11073, 13841, 16609))
    real.plug("a", 1, DIMM, 512 << 20)
    assert real.vm_total_pages == 212362
    real.write(STATE % 32, "online_movable")
    assert real.vm.min_free_kbytes == 45056
    assert marks(real, 0, 0) == (165, 206, 247)
    assert marks(real, 0, 1) == (9690, 12112, 14534)
    assert marks(real, 1, 3) == (1408, 1760, 2112)
    assert real.vm_total_pages == 245130
    assert real.nodes[1].zone(3).pcp_state(0)[1:3] == (880, 7)
    real.write(STATE % 32, "offline")
    assert marks(real, 0, 1) == (11075, 13843, 16611)
    real.validate()


def test_kernel_blocks_raise_min_free_for_huge_pages(real: Machine) -> None:
    real.plug("a", 1, DIMM, 512 << 20)
    seen = []
    for block in (32, 33, 34):
        real.write(STATE % block, "online_kernel")
        seen.append(real.vm.min_free_kbytes)
    assert seen == [52100, 58628, 65160]
    assert marks(real, 1, 2) == (4888, 6110, 7332)
    assert real.nodes[1].zone(2).pcp_state(1)[1:3] == (3055, 31)
    real.validate()


def test_a_user_value_is_kept_until_huge_pages_need_more(real: Machine) -> None:
    real.write("/proc/sys/vm/min_free_kbytes", "8192")
    real.plug("a", 1, DIMM, 128 << 20)
    real.log.clear()
    real.write(STATE % 32, "online_movable")
    assert real.log[-2].startswith("min_free_kbytes is not updated to ")
    assert real.log[-1].startswith("khugepaged: raising min_free_kbytes from 8192 to ")
    real.validate()


def test_lowmem_reserve(real: Machine) -> None:
    real.plug("a", 0, DIMM, 128 << 20)
    real.write(STATE % 32, "online_movable")
    assert real.nodes[0].zone(0).lowmem_reserve == (0, 880, 880, 1008, 1008)
    assert real.nodes[0].zone(1).lowmem_reserve == (0, 0, 0, 128, 128)
    real.write("/proc/sys/vm/lowmem_reserve_ratio", "0 64")
    assert real.nodes[0].zone(0).lowmem_reserve == (0,) * 5
    assert real.read("/proc/sys/vm/lowmem_reserve_ratio") == "0\t64\t32\t0\t0\n"
    real.validate()


@pytest.mark.parametrize(
    ("managed", "batch"),
    [(0, 1), (12287, 1), (12288, 3), (24575, 3), (24576, 7), (45056, 15), (90112, 31),
     (176127, 31), (176128, 63), (1 << 30, 63)],
)  # fmt: skip
def test_batch_sizes(managed: int, batch: int) -> None:
    assert zone_batchsize(managed) == batch


def test_stat_thresholds(real: Machine) -> None:
    real.plug("a", 1, DIMM, 128 << 20)
    real.write(STATE % 32, "online_movable")
    thresholds = [real.nodes[n].zone(z).stat_threshold for n, z in ((0, 0), (0, 1), (1, 3))]
    assert thresholds == [4, 16, 8]
    real.validate()


def test_a_small_machine_has_no_huge_page_raise() -> None:
    m = two_nodes(memory="384M", nodes=[{"cpus": "0-1", "memory": "384M"}, {}])
    assert not m.vm.thp_available
    assert m.vm.min_free_kbytes < 6000
    m.validate()


def test_zone_fallback_orders_follow_distances() -> None:
    m = two_nodes(
        memory="2G",
        nodes=[{"cpus": "0", "memory": "1G"}, {"cpus": "1", "memory": "1G"}, {}, {}],
        distances=[[10, 20, 17, 28], [20, 10, 28, 17], [17, 28, 10, 28], [28, 17, 28, 10]],
    )
    m.plug("a", 3, DIMM, 128 << 20)
    assert m.log[-3] == "Fallback order for Node 2: 2 1 0 "
    m.write(STATE % 32, "online_kernel")
    orders = [m.nodes[n].fallback_order for n in range(3)]
    assert orders == [[0, 1, 2], [1, 2, 0], [2, 1, 0]]
    m.validate()


@pytest.mark.parametrize(
    ("low", "high"),
    [(0x7FFFFFFF, 0x7FFFFFFF), (0x80000000, 252), (0xC0000000, 252), (0x100001000, 0x1000)],
)
def test_a_cpus_share_wraps_as_an_int_does(low: int, high: int) -> None:
    """At a watermark_scale_factor of 3000 a zone of 28 TiB has such a low watermark."""
    m = two_nodes(cpus=1, nodes=[{"cpus": "0", "memory": "1G"}, {}])
    zone = m.nodes[0].zone(1)
    before, zone.watermark_low = zone.watermark_low, low
    assert zone_highsize(m, zone, 63) == high
    zone_set_pageset_high_and_batch(m, zone)
    assert zone.pageset_high == max(high, 4 * zone.pageset_batch)
    zone.watermark_low = before
    zone_set_pageset_high_and_batch(m, zone)
    m.validate()


# -- against the readable twin --------------------------------------------------------------

Sizes = st.one_of(
    st.just(0),
    st.integers(1, 5000),
    st.integers(1, 1 << 17),
    st.integers(1 << 17, 1 << 27),
)


def machine_of(cpus: list[int], nodes: list[dict[str, Any]]) -> Machine:
    """A machine with so many CPUs on each node, and zones with drawn sizes and marks."""
    places = []
    for nid, count in enumerate(cpus):
        first = sum(cpus[:nid])
        places.append({"cpus": f"{first}-{first + count - 1}"} if count else {})
    places[0]["memory"] = "1G"
    config = {"memory": "1G", "maxmem": "64G", "cpus": sum(cpus), "nodes": places}
    m = Machine(MachineConfig.from_dict(config))
    # A node with neither CPUs nor memory is possible only if it is the last.
    for pgdat, drawn in zip(m.nodes.values(), nodes, strict=False):
        for i, zone in enumerate(pgdat.zones[:4]):
            zone.managed_pages = drawn["sizes"][i]
            zone.present_pages = drawn["sizes"][i] + drawn["holes"][i]
            zone.watermark_min, zone.watermark_low, zone.watermark_high = sorted(drawn["marks"])
            zone.watermark_boost = drawn["boost"]
        if any(drawn["sizes"]) or any(drawn["holes"]):
            m.set_node_online(pgdat.node_id)
    m.n_memory = {nid for nid, p in m.nodes.items() if p.populated}
    build_all_zonelists(m)
    return m


Nodes = st.integers(1, 4).flatmap(
    lambda n: st.lists(
        st.fixed_dictionaries(
            {
                "sizes": st.lists(Sizes, min_size=4, max_size=4),
                "holes": st.lists(st.integers(0, 2), min_size=4, max_size=4),
                "marks": st.lists(st.integers(0, 100_000), min_size=3, max_size=3),
                "boost": st.sampled_from([0, 512, 40_000]),
            }
        ),
        min_size=n,
        max_size=n,
    )
)
Step = st.one_of(
    st.tuples(st.just("init"), st.just(0)),
    st.tuples(st.just("huge_pages"), st.booleans()),
    st.tuples(st.just("min_free_kbytes"), st.integers(0, 2**31 - 1)),
    st.tuples(st.just("min_free_kbytes"), st.integers(0, 300_000)),
    st.tuples(st.just("watermark_scale_factor"), st.integers(1, 3000)),
    st.tuples(
        st.just("percpu_pagelist_high_fraction"), st.one_of(st.just(0), st.integers(8, 2**31 - 1))
    ),
    st.tuples(
        st.just("lowmem_reserve_ratio"),
        st.lists(st.integers(-1, 2**31 - 1) | st.integers(0, 300), min_size=5, max_size=5),
    ),
)


def do(m: Machine, twin: TwinMachine, name: str, value: Any) -> None:
    """Take one step on both."""
    if name == "init":
        init_per_zone_wmark_min(m)
        twin_of.init_per_zone_wmark_min(twin)
        return
    if name == "huge_pages":
        set_thp_enabled(m, "madvise" if value else "never")
        twin_of.set_huge_pages(twin, value)
        return
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    m.write(f"/proc/sys/vm/{name}", text)
    if name == "lowmem_reserve_ratio":
        twin.vm.lowmem_reserve_ratio = [max(v, 0) for v in value]
        twin_of.setup_lowmem_reserve(twin)
        return
    setattr(twin.vm, name, value)
    if name == "percpu_pagelist_high_fraction":
        for zone in twin.zones:
            if zone.present:
                twin_of.set_pageset(twin, zone)
        return
    if name == "min_free_kbytes":
        twin.vm.user_min_free_kbytes = value
    twin_of.setup_per_zone_wmarks(twin)


def assert_same(m: Machine, twin: TwinMachine) -> None:
    for zone, mine in zip(m.all_zones(), twin.zones, strict=True):
        assert zone.watermark_boost == mine.boost
        have = (zone.watermark_min, zone.watermark_low, zone.watermark_high)
        assert have == (mine.wmark_min, mine.wmark_low, mine.wmark_high)
        assert zone.lowmem_reserve == tuple(mine.reserve)
        assert (zone.pageset_high, zone.pageset_batch) == (mine.pageset_high, mine.pageset_batch)
        for cpu, pcp in enumerate(mine.pcps):
            assert zone.pcp_state(cpu)[1:3] == (pcp.high, pcp.batch)
        assert zone.stat_threshold == mine.threshold
    assert m.vm.min_free_kbytes == twin.vm.min_free_kbytes
    for nid, kept in twin.totalreserve_of_node.items():
        assert m.nodes[nid].totalreserve_pages == kept
    for nid, node in enumerate(twin.nodes):
        assert [z.index for z in m.nodes[nid].zonelist] == [
            5 * z.nid + z.idx for z in node.fallback
        ]
    assert m.memmap_engine.grouping_disabled == twin.pages.grouping_disabled


@settings(max_examples=150, deadline=None)
@given(
    nodes=Nodes,
    cpus=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    steps=st.lists(Step, min_size=1, max_size=6),
)
def test_marks_reserves_and_sizes_are_the_twins(
    nodes: list[dict[str, Any]], cpus: list[int], steps: list[tuple[str, Any]]
) -> None:
    m = machine_of([max(cpus[0], 1), *cpus[1 : len(nodes)]], nodes)
    twin = TwinMachine.of(m)
    twin.vm.huge_pages = m.vm.thp_available
    assert_same(m, twin)
    for name, value in steps:
        do(m, twin, name, value)
        assert_same(m, twin)


@settings(max_examples=200, deadline=None)
@given(
    managed=st.integers(0, 1 << 34) | Sizes,
    low=st.integers(0, 1 << 34) | st.integers(0, 1 << 20),
    boost=st.integers(0, 1 << 20),
    fraction=st.just(0) | st.integers(8, 10_000) | st.just(2**31 - 1),
    cpus=st.lists(st.integers(0, 3), min_size=2, max_size=2),
)
@example(managed=1 << 34, low=0x80000000, boost=0, fraction=0, cpus=[1, 0])
@example(managed=1 << 34, low=0x7FFFFFFF, boost=1, fraction=0, cpus=[1, 0])
@example(managed=1 << 34, low=0x100001000, boost=0, fraction=0, cpus=[1, 1])
@example(managed=1 << 34, low=0, boost=0, fraction=8, cpus=[1, 0])
def test_sizes_of_per_cpu_lists_are_the_twins(
    managed: int, low: int, boost: int, fraction: int, cpus: list[int]
) -> None:
    """Also where a CPU's share does not fit an int."""
    none = {"sizes": [0] * 4, "holes": [0] * 4, "marks": [0] * 3, "boost": 0}
    m = machine_of([max(cpus[0], 1), cpus[1]], [none, none])
    zone = m.nodes[1].zone(2)
    zone.managed_pages = zone.present_pages = managed
    zone.watermark_low, zone.watermark_boost = low, boost
    m.vm.percpu_pagelist_high_fraction = fraction
    twin = TwinMachine.of(m)
    twin.vm.percpu_pagelist_high_fraction = fraction
    mine = twin.zone(1, 2)
    assert zone_batchsize(managed) == twin_of.batch_size(managed)
    for batch in (1, 63):
        assert zone_highsize(m, zone, batch) == twin_of.high_size(twin, mine, batch)
    zone_set_pageset_high_and_batch(m, zone)
    twin_of.set_pageset(twin, mine)
    assert zone.pcp_state(0)[1:3] == (mine.pcps[0].high, mine.pcps[0].batch)


def test_beyond_16_tib_the_kernel_divides_by_too_little() -> None:
    """The sum of pages is cut to 32 bits: 2^32 pages more change nothing for the others."""
    m = two_nodes()
    small, large = m.nodes[0].zone(1), m.nodes[1].zone(3)
    pages_min = m.vm.min_free_kbytes >> 2
    others = sum(z.managed_pages for z in m.nodes[0].zones)
    setup_per_zone_wmarks(m)
    before = small.watermark_min
    m.set_node_online(1)
    large.managed_pages = 1 << 32
    setup_per_zone_wmarks(m)
    assert small.watermark_min == before == pages_min * small.managed_pages // others
    assert large.watermark_min == (pages_min << 32) // others
