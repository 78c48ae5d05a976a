"""The /sys part of the tree put together, and what hangs below its buses."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kmm import (
    sysfs_acpi,
    sysfs_bus,
    sysfs_cpu,
    sysfs_dax,
    sysfs_firmware,
    sysfs_hugetlb,
    sysfs_memory,
    sysfs_mm,
    sysfs_node,
    sysfs_tiers,
)
from kmm.sysfs_dax import loaded
from kmm.sysfs_entry import Entry
from kmm.sysfs_firmware import DIRECTORIES as FIRMWARE_DIRECTORIES

if TYPE_CHECKING:
    pass


def _top(path: str, names: str, more: str, mode: int = 0o755) -> tuple[str, Callable[..., Entry]]:
    """A directory with some more names where there are dax devices."""
    return path, lambda m, _: Entry(mode, names=(f"{names} {more}" if loaded(m) else names).split())


ENTRIES = (
    _top("/sys", "bus devices firmware kernel module", "dev", 0o555),
    _top("/sys/devices", "LNXSYSTM:00 system virtual", "platform"),
    _top("/sys/bus", f"{' '.join(sysfs_bus.NAMES)} dax", "platform"),
    *sysfs_memory.ENTRIES,
    *sysfs_node.ENTRIES,
    *sysfs_cpu.ENTRIES,
    *sysfs_acpi.ENTRIES,
    *sysfs_firmware.ENTRIES,
    *sysfs_hugetlb.ENTRIES,
    *sysfs_dax.ENTRIES,
    *sysfs_mm.ENTRIES,
    *sysfs_tiers.ENTRIES,
    *sysfs_bus.ENTRIES,
)

DIRECTORIES = {**FIRMWARE_DIRECTORIES, **sysfs_dax.DIRECTORIES, **sysfs_mm.DIRECTORIES}

__all__ = ["DIRECTORIES", "ENTRIES"]
