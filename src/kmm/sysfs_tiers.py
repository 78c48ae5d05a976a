"""/sys/devices/virtual/memory_tiering: nodes with memory by how near it is (mm/memory-tiers.c).

A node is in the tier of DRAM, or, where only kmem has brought it memory, in the one of dax devices.
That the latter comes and goes is told in no uevent here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kmm.params import format_list
from kmm.sysfs_entry import POWER, Entry, directory, link, power_file, readonly, uevent_file

if TYPE_CHECKING:
    from kmm.machine import Machine

TIERS = "/sys/devices/virtual/memory_tiering"
# Abstract distances, of which 128 make a tier: DRAM lies in the middle of the fifth.
_DISTANCE_OF_DRAM = 4 * 128 + 64
_DRAM, _DAX = _DISTANCE_OF_DRAM >> 7, 5 * _DISTANCE_OF_DRAM >> 7


def _of_dax_alone(m: Machine, nid: int) -> bool:
    """Whether all memory of a node belongs to devices that kmem drives."""
    ranges = [
        (d.start, d.end)
        for d in m.dax_devices.values()
        if d.driver == "kmem" and d.target_node == nid
    ]
    starts = [b * m.block_size for b, block in m.memory_blocks.items() if nid in block.nodes]
    return bool(ranges) and all(any(low <= s < high for low, high in ranges) for s in starts)


def memory_tiers(m: Machine) -> dict[int, list[int]]:
    """Return the nodes with memory of each tier that has any, by the tier's number."""
    tiers: dict[int, list[int]] = {}
    for nid in sorted(m.n_memory):
        tiers.setdefault(_DAX if _of_dax_alone(m, nid) else _DRAM, []).append(nid)
    return tiers


def names(m: Machine) -> list[str]:
    """Return the names of the tiers' directories."""
    return [f"memory_tier{number}" for number in sorted(memory_tiers(m))]


def _file(m: Machine, match: re.Match[str]) -> Entry | None:
    nodes, name = memory_tiers(m).get(int(match[1])), match[2]
    if nodes is None:
        return None
    files = {
        "nodelist": readonly(lambda m: format_list(nodes) + "\n"),
        "power": directory(POWER),
        "subsystem": link("../../../../bus/memory_tiering"),
        "uevent": uevent_file(
            f"/devices/virtual/memory_tiering/memory_tier{match[1]}", "memory_tiering"
        ),
    }
    return directory(files) if name is None else files.get(name)


ENTRIES = (
    ("/sys/devices/virtual", lambda m, _: directory(("memory_tiering",))),
    (TIERS, lambda m, _: directory(["power", "uevent", *names(m)])),
    (
        f"{TIERS}/uevent",
        lambda m, _: uevent_file("/devices/virtual/memory_tiering", "memory_tiering"),
    ),
    (f"{TIERS}/power", lambda m, _: directory(POWER)),
    (rf"{TIERS}/memory_tier(4|22)(?:/(\w+))?", _file),
    (rf"({TIERS}(?:/memory_tier[0-9]+)?)/power/(\w+)", power_file),
)
