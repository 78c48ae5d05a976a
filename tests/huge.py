"""Machines with huge pages, for several tests."""

from __future__ import annotations

from kmm import Machine
from kmm.hugetlb import HState
from tests.conftest import DIMM, two_nodes

BLOCK = 128 << 20
MIB2, GIB1 = 2 << 20, 1 << 30
POOL = "/sys/kernel/mm/hugepages/hugepages-%dkB/%s"
NODE_POOL = "/sys/devices/system/node/node%d/hugepages/hugepages-%dkB/%s"
STATE = "/sys/devices/system/memory/memory%d/state"


def machine(zone: str = "movable", size: int = 4 * BLOCK, cmdline: str = "") -> Machine:
    """Node 0 with 1 GiB, and node 1 with a DIMM of a size in a zone of a kind."""
    m = two_nodes(f"memhp_default_state=online_{zone} {cmdline}")
    m.plug("a", 1, DIMM, size)
    return m


def set_pool(m: Machine, count: int, nid: int | None = None, kb: int = 2048) -> None:
    """Write the size of a pool, or of its part on a node."""
    path = POOL % (kb, "nr_hugepages")
    m.write(path if nid is None else NODE_POOL % (nid, kb, "nr_hugepages"), str(count))


def counts(h: HState) -> tuple[int, int, int, int]:
    """Pages of a pool, free ones, reserved ones, surplus ones."""
    return h.nr_huge_pages, h.free_huge_pages, h.resv_huge_pages, h.surplus_huge_pages
