"""The ACPI namespace's devices, and the containers of the system bus (drivers/acpi)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kmm.acpi_memhotplug import AcpiDevice
from kmm.acpi_scan import container_offline, container_online, eject_store
from kmm.sysfs_entry import (
    POWER,
    Entry,
    directory,
    kstrtobool,
    link,
    power_file,
    readonly,
    uevent_file,
)

if TYPE_CHECKING:
    from kmm.machine import Machine

ACPI_BUS, ACPI_ROOT = "/sys/bus/acpi/devices", "/sys/devices/LNXSYSTM:00/LNXSYBUS:00"
CONTAINER = "/sys/devices/system/container"
HOTPLUG_PARENT = "PNP0A06:04"  # the platform's device that holds the slots
_PATH = "\\_SB_.MHPC"  # its name in the firmware's tables
_SLOTS = {"path": _PATH, "status": "11", "uid": "DIMM devices"}
_COMMON = ("hid", "modalias", "power", "subsystem", "uevent")
_OF_DEVICE, _OF_SLOT = ("eject", "status"), ("path", "uid")


def acpi_parent(m: Machine, name: str) -> str:
    """Return the name of the device that holds a memory device: a container, or the slots'."""
    holders = (c.name for c in m.acpi_containers.values() if name in {d.name for d in c.children})
    return next(holders, HOTPLUG_PARENT)


def acpi_path(m: Machine, name: str) -> str:
    """Return a memory device's or container's path from /sys/devices on."""
    middle = "" if name in m.acpi_containers else f"/{acpi_parent(m, name)}"
    return f"LNXSYSTM:00/LNXSYBUS:00{middle}/{name}"


def _devices(m: Machine, parent: str) -> list[AcpiDevice]:
    return [d for d in m.acpi_devices if acpi_parent(m, d.name) == parent]


def _bus_device(m: Machine, match: re.Match[str]) -> Entry | None:
    if match[1] not in names(m):
        return None
    if match[1] == HOTPLUG_PARENT:
        return link(f"../../../devices/LNXSYSTM:00/LNXSYBUS:00/{HOTPLUG_PARENT}")
    return link(f"../../../devices/{acpi_path(m, match[1])}")


def names(m: Machine) -> list[str]:
    """Return the names of the devices on the ACPI bus."""
    return [HOTPLUG_PARENT, *m.acpi_containers, *(d.name for d in m.acpi_devices)]


def _common(m: Machine, path: str, hid: str, name: str) -> Entry | None:
    """What every device of the ACPI namespace has; one that is not present is known by no id."""
    depth = "../" * path.count("/")
    return {
        "hid": readonly(lambda m: f"{hid}\n"),
        "modalias": readonly(lambda m: f"acpi:{hid}:\n"),
        "power": directory(POWER),
        "subsystem": link(f"../../{depth}bus/acpi"),
        "uevent": uevent_file(f"/devices/{path}", "acpi", lambda: f"MODALIAS=acpi:{hid}:\n"),
    }.get(name)


def _parent(m: Machine, match: re.Match[str]) -> Entry | None:
    """A device that holds memory devices: the slots' parent, or a container."""
    parent, name = match[1], match[2]
    container = m.acpi_containers.get(parent)
    if container is None and parent != HOTPLUG_PARENT:
        return None
    if name is None:
        own = ["physical_node"] if container is not None else list(_SLOTS)
        return directory([*_COMMON, *own, *(d.name for d in _devices(m, parent))])
    common = _common(m, f"LNXSYSTM:00/LNXSYBUS:00/{parent}", parent.partition(":")[0], name)
    if common is not None:
        return common
    if name in _SLOTS and container is None:
        return readonly(lambda m: f"{_SLOTS[name]}\n")
    if name == "physical_node" and container is not None:
        return link(f"../../../system/container/{parent}")
    device = _device(m, parent, name)
    if device is None:
        return None
    slot = _OF_SLOT if parent == HOTPLUG_PARENT else ()
    return directory([*_COMMON, *_OF_DEVICE, *slot, *_physical_nodes(device)])


def _device(m: Machine, parent: str, name: str) -> AcpiDevice | None:
    return next((d for d in _devices(m, parent) if d.name == name), None)


def _physical_nodes(device: AcpiDevice) -> dict[str, int]:
    """Return the memory blocks of a device by the names of its links; the first has no number."""
    return {f"physical_node{number or ''}": b for b, number in device.physical_nodes.items()}


def _device_file(m: Machine, match: re.Match[str]) -> Entry | None:
    device, name = _device(m, match[1], match[2]), match[3]
    if device is None:
        return None
    if name == "eject":
        return Entry(0o200, write=lambda m, t: eject_store(m, device, t))
    status = device.dimm.sta if device.dimm else 0
    if name == "status":
        return readonly(lambda m: f"{status}\n")
    if match[1] == HOTPLUG_PARENT and name in _OF_SLOT:
        slot = int(device.name.partition(":")[2], 16)
        text = f"{_PATH}.MP{slot:02X}" if name == "path" else f"0x{slot:02X}"
        return readonly(lambda m: f"{text}\n")
    path = acpi_path(m, device.name)
    if not status and name == "modalias":
        return readonly(lambda m: "")
    if not status and name == "uevent":
        return uevent_file(f"/devices/{path}", "acpi", lambda: "MODALIAS=\n")
    common = _common(m, path, device.hid, name)
    if common is not None:
        return common
    block = _physical_nodes(device).get(name)
    return link(f"../../../../system/memory/memory{block}") if block is not None else None


def _container_file(m: Machine, match: re.Match[str]) -> Entry | None:
    device = m.acpi_containers.get(match[1])
    if device is None:
        return None
    if match[2] is None:
        return directory(("firmware_node", "online", "power", "subsystem", "uevent"))

    def store(m: Machine, text: str) -> None:
        (container_online if kstrtobool(text) else container_offline)(m, device)

    if match[2] == "online":
        return Entry(0o644, lambda m: f"{int(not device.offlined)}\n", store)
    if match[2] == "firmware_node":
        return link(f"../../../{acpi_path(m, device.name)}")
    if match[2] == "uevent":
        return uevent_file(f"/devices/system/container/{device.name}", "container")
    if match[2] == "subsystem":
        return link("../../../../bus/container")
    if match[2] == "power":
        return directory(POWER)
    return None


ENTRIES = (
    (rf"{ACPI_BUS}/([\w:]+)", _bus_device),
    (ACPI_ROOT, lambda m, _: directory([HOTPLUG_PARENT, *m.acpi_containers])),
    (rf"{ACPI_ROOT}/([\w:]+)(?:/([\w:]+))?", _parent),
    (rf"{ACPI_ROOT}/([\w:]+)/([\w:]+)/(\w+)", _device_file),
    (rf"({ACPI_ROOT}/[\w:]+(?:/[\w:]+)?)/power/(\w+)", power_file),
    (rf"({CONTAINER}/[\w:]+)/power/(\w+)", power_file),
    (CONTAINER, lambda m, _: directory(m.acpi_containers)),
    (rf"{CONTAINER}/([\w:]+)(?:/(\w+))?", _container_file),
)
