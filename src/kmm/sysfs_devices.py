"""The /sys part of the tree put together, and what hangs below its buses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from kmm import (
    sysfs_acpi,
    sysfs_cpu,
    sysfs_dax,
    sysfs_firmware,
    sysfs_hugetlb,
    sysfs_memory,
    sysfs_node,
)
from kmm.sysfs_dax import loaded
from kmm.sysfs_entry import Entry, directory, link
from kmm.sysfs_firmware import DIRECTORIES as FIRMWARE_DIRECTORIES

if TYPE_CHECKING:
    from kmm.machine import Machine

# The devices of each bus: where they are from /sys/devices on, and their names.
_BUSES: dict[str, Callable[[Machine], Iterable[str]]] = {
    "cpu": sysfs_cpu.names,
    "memory": lambda m: (f"memory{b}" for b in m.memory_blocks),
    "node": lambda m: (f"node{n}" for n in m.node_devices),
}


def _bus_dir(m: Machine, match: re.Match[str]) -> Entry:
    return directory(_BUSES[match[1]](m))


def _bus_device(m: Machine, match: re.Match[str]) -> Entry | None:
    bus, name = match[1], match[2]
    there = name in _BUSES[bus](m)
    return link(f"../../../devices/system/{bus}/{name}") if there else None


def _top(path: str, names: str, more: str) -> tuple[str, Callable[..., Entry]]:
    """A directory with some more names where there are dax devices."""
    return path, lambda m, _: directory(f"{names} {more}".split() if loaded(m) else names.split())


ENTRIES = (
    _top("/sys", "bus devices firmware kernel module", "dev"),
    _top("/sys/devices", "LNXSYSTM:00 system", "platform"),
    _top("/sys/bus", "acpi cpu dax memory node", "platform"),
    *sysfs_memory.ENTRIES,
    *sysfs_node.ENTRIES,
    *sysfs_cpu.ENTRIES,
    *sysfs_acpi.ENTRIES,
    *sysfs_firmware.ENTRIES,
    *sysfs_hugetlb.ENTRIES,
    *sysfs_dax.ENTRIES,
    (rf"/sys/bus/({'|'.join(_BUSES)})/devices", _bus_dir),
    (rf"/sys/bus/({'|'.join(_BUSES)})/devices/(\w+)", _bus_device),
)

DIRECTORIES = {**FIRMWARE_DIRECTORIES, **sysfs_dax.DIRECTORIES}

__all__ = ["DIRECTORIES", "ENTRIES"]
