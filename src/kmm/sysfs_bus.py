"""/sys/bus: the buses that devices of memory hang on (drivers/base/bus.c)."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from kmm import sysfs_acpi, sysfs_cpu, sysfs_tiers
from kmm.errors import kernel_error, shown
from kmm.sysfs_entry import Entry, directory, link, synthetic_uevent, word

if TYPE_CHECKING:
    from kmm.machine import Machine

BUS = "/sys/bus"
# The devices of each bus of the system: they are in a directory of its name.
_SYSTEM: dict[str, Callable[[Machine], Iterable[str]]] = {
    "container": lambda m: m.acpi_containers,
    "cpu": sysfs_cpu.names,
    "memory": lambda m: (f"memory{b}" for b in m.memory_blocks),
    "node": lambda m: (f"node{n}" for n in m.node_devices),
}
NAMES = ("acpi", "memory_tiering", *_SYSTEM)
_FILES = ("drivers_autoprobe", "drivers_probe", "uevent")
# Buses without a driver; those of the others are left out.
_DRIVERLESS = ("container", "memory", "memory_tiering", "node")


def _devices(m: Machine, bus: str) -> Iterable[str]:
    others = {"acpi": sysfs_acpi.names, "memory_tiering": sysfs_tiers.names}
    return (others | _SYSTEM)[bus](m)


def _bus(m: Machine, match: re.Match[str]) -> Entry:
    drivers = ["drivers"] * (match[1] in _DRIVERLESS)
    return directory(["devices", *drivers, *_FILES])


def _file(m: Machine, match: re.Match[str]) -> Entry:
    path, bus, name = match[0], match[1], match[2]

    def autoprobe(m: Machine, text: str) -> None:
        m.sysfs_values[path] = "0\n" if text[:1] == "0" else "1\n"

    def probe(m: Machine, text: str) -> None:
        # A device that is there has its driver already, or the bus none for it.
        if word(text) not in _devices(m, bus):
            what = f"drivers_probe: {shown(word(text))}; allowed: a device of the bus {bus}"
            raise kernel_error(-errno.ENODEV, what)

    if name == "drivers_autoprobe":
        return Entry(0o644, lambda m: m.sysfs_values.get(path, "1\n"), autoprobe)
    if name == "drivers_probe":
        return Entry(0o200, write=probe)
    return Entry(0o200, write=lambda m, t: synthetic_uevent(m, f"/bus/{bus}", "bus", t))


def _device(m: Machine, match: re.Match[str]) -> Entry | None:
    bus, name = match[1], match[2]
    if name not in _SYSTEM[bus](m):
        return None
    return link(f"../../../devices/system/{bus}/{name}")


def _tier(m: Machine, match: re.Match[str]) -> Entry | None:
    there = match[1] in sysfs_tiers.names(m)
    return link(f"../../../devices/virtual/memory_tiering/{match[1]}") if there else None


_EACH = "|".join(NAMES)

ENTRIES = (
    (rf"{BUS}/({_EACH})", _bus),
    (rf"{BUS}/({_EACH})/({'|'.join(_FILES)})", _file),
    (rf"{BUS}/(?:{'|'.join(_DRIVERLESS)})/drivers", lambda m, _: directory(())),
    (rf"{BUS}/({_EACH})/devices", lambda m, match: directory(_devices(m, match[1]))),
    (rf"{BUS}/({'|'.join(_SYSTEM)})/devices/([\w:]+)", _device),
    (rf"{BUS}/memory_tiering/devices/(\w+)", _tier),
)
