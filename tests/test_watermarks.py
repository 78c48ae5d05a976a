"""Watermarks and reserves against figures seen on a real kernel."""

from __future__ import annotations

import pytest

from kmm import Machine
from kmm.replay import boot_machine, snapshot_files
from kmm.watermarks import zone_batchsize, zone_highsize, zone_set_pageset_high_and_batch
from tests.conftest import DIMM, recording, two_nodes

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
