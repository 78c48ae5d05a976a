"""A machine of three nodes with hot-plugged memory, and the requests that are made of it."""

from __future__ import annotations

from typing import Any

from kmm import (
    GFP_ATOMIC,
    GFP_HIGHUSER_MOVABLE,
    GFP_KERNEL,
    GFP_NOWAIT,
    Machine,
    MachineConfig,
    gfp,
)
from tests.reference.hotplug_twin import SECTION

DIMM = 1 << 32
BLOCKS = [(DIMM >> 12) + i * SECTION for i in range(6)]  # first pfns: 2 each of three nodes
GFPS = [
    GFP_KERNEL,
    GFP_KERNEL | gfp.__GFP_RECLAIMABLE,
    GFP_KERNEL | gfp.__GFP_MOVABLE,
    GFP_HIGHUSER_MOVABLE,
    GFP_KERNEL | gfp.__GFP_DMA32,
    GFP_KERNEL | gfp.__GFP_DMA,
    GFP_ATOMIC,
    GFP_ATOMIC | gfp.__GFP_NOMEMALLOC,
    GFP_NOWAIT,
    0,
    GFP_KERNEL | gfp.__GFP_HIGH,
]
THISNODE = gfp.__GFP_THISNODE
MEMALLOC = gfp.__GFP_MEMALLOC
TYPES = [0, gfp.__GFP_MOVABLE, gfp.__GFP_RECLAIMABLE]
GFPS += [
    GFP_KERNEL | MEMALLOC,
    GFP_ATOMIC | MEMALLOC,
    GFP_KERNEL | gfp.__GFP_NOFAIL,
    GFP_NOWAIT | gfp.__GFP_NOFAIL,
]
ORDERS = [0, 0, 0, 1, 2, 3, 4, 5, 7, 9, 10]


def build(memory: str = "1G", dimm_blocks: int = 2) -> Machine:
    """Three nodes, the last without CPUs; only the first has memory at boot."""
    config: dict[str, Any] = {
        "memory": memory,
        "maxmem": "32G",
        "cpus": 3,
        "nodes": [{"cpus": "0-1", "memory": memory}, {"cpus": "2"}, {}],
        "distances": [[10, 20, 17], [20, 10, 28], [17, 28, 10]],
        "cmdline": "memhp_default_state=offline",
    }
    m = Machine(MachineConfig.from_dict(config))
    size = dimm_blocks << 27
    for nid in range(3):
        m.plug(f"d{nid}", nid, DIMM + nid * size, size)
    return m


def set_state(m: Machine, first: int, how: str) -> None:
    m.write(f"/sys/devices/system/memory/memory{first // SECTION}/state", how)
