"""What a machine boots with."""

from __future__ import annotations

from itertools import pairwise

import pytest

from kmm import KernelError, Machine, MachineConfig
from kmm.boot import KERNEL_PAGES, e820

GIB = 1 << 30
STATE = "/sys/devices/system/memory/memory{}/state"


@pytest.mark.parametrize("high", [0, GIB, 1020 * GIB, 2048 * GIB])
def test_the_ranges_of_firmwares_map_do_not_overlap(high: int) -> None:
    rows = e820(2 * GIB, high)
    assert all(a[1] < b[0] for a, b in pairwise(rows))
    assert sum(e + 1 - s for s, e, kind in rows if kind == "System RAM") > high


@pytest.mark.parametrize("block", [8, 32])
def test_the_first_block_of_a_nodes_highest_zone_holds_slabs(block: int) -> None:
    """Node 0 ends in DMA32 at 1 GiB, node 1 goes on above the hole, in Normal."""
    nodes = (
        [{"cpus": "0", "memory": "1G"}, {"memory": "4G"}]
        if block == 32
        else [{"cpus": "0", "memory": "1G"}, {"memory": "1G"}]
    )
    memory = "5G" if block == 32 else "2G"
    data = {"memory": memory, "maxmem": "16G", "cpus": 1, "nodes": nodes}
    m = Machine(MachineConfig.from_dict(data))
    with pytest.raises(KernelError) as error:
        m.write(STATE.format(block), "offline")
    assert error.value.errno == 16
    assert f"pfn:{block << 15:#x}" in m.log[-3]
    assert "(slab|" in m.log[-2]
    m.write(STATE.format(block + 1), "offline")
    m.validate()


def test_pages_in_use_are_managed_but_not_free(m: Machine) -> None:
    zone = m.nodes[0].zone(1)
    assert zone.managed_pages - zone.nr_free_pages == KERNEL_PAGES
    assert m.totalram_pages == sum(z.managed_pages for z in m.all_zones())
    m.validate()


def test_a_tiny_node_keeps_most_of_its_memory_free() -> None:
    nodes = [{"cpus": "0", "memory": "1G"}, {"memory": "16M"}]
    m = Machine(MachineConfig.from_dict({"memory": "1040M", "cpus": 1, "nodes": nodes}))
    zone = m.nodes[1].zone(1)
    assert zone.nr_free_pages > zone.managed_pages // 2
    m.validate()
