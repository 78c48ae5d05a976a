"""The /sys part of the tree put together, and the links inside its paths."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kmm import sysfs_firmware, sysfs_memory, sysfs_node
from kmm.sysfs_firmware import DIRECTORIES
from kmm.sysfs_memory import MEMORY
from kmm.sysfs_node import NODE

if TYPE_CHECKING:
    from kmm.machine import Machine


def canonical(m: Machine, path: str) -> str:
    """Return a path with the links inside it resolved (a node's block, a bus's device)."""
    path = re.sub(r"/+", "/", path).rstrip("/") or "/"
    path = re.sub(r"^/sys/bus/(memory|node)/devices/", r"/sys/devices/system/\1/", path)
    for _ in range(4):
        match = re.match(rf"{NODE}/node(\d+)/memory(\d+)(/.+)$", path)
        if match:
            block = m.memory_blocks.get(int(match[2]))
            if block is None or int(match[1]) not in block.nodes:
                return path
            path = f"{MEMORY}/memory{match[2]}{match[3]}"
            continue
        match = re.match(rf"{MEMORY}/memory(\d+)/node(\d+)(/.+)$", path)
        if match:
            block = m.memory_blocks.get(int(match[1]))
            if block is None or int(match[2]) not in block.nodes:
                return path
            path = f"{NODE}/node{match[2]}{match[3]}"
            continue
        break
    return path


ENTRIES = (*sysfs_memory.ENTRIES, *sysfs_node.ENTRIES, *sysfs_firmware.ENTRIES)

__all__ = ["DIRECTORIES", "ENTRIES", "canonical"]
