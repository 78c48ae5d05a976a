"""ACPI memory devices: notify, add, eject (drivers/acpi/acpi_memhotplug.c, scan.c)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kmm.arch_x86_64 import memory_add_physaddr_to_nid
from kmm.errors import KernelError, kernel_error
from kmm.firmware import Dimm
from kmm.memory_block import MemoryBlock, device_offline, device_online, walk_memory_blocks
from kmm.memory_group import memory_group_register_static, memory_group_unregister
from kmm.memory_hotplug import (
    MHP_MEMMAP_ON_MEMORY,
    MHP_NID_IS_MGID,
    __add_memory,
    __remove_memory,
    mhp_supports_memmap_on_memory,
)
from kmm.params import PAGE_SHIFT
from kmm.trace import traced

if TYPE_CHECKING:
    from kmm.machine import Machine

ACPI_NOTIFY_BUS_CHECK, ACPI_NOTIFY_DEVICE_CHECK = 0x00, 0x01
ACPI_NOTIFY_EJECT_REQUEST, ACPI_OST_EC_OSPM_EJECT = 0x03, 0x103
ACPI_OST_SC_SUCCESS, ACPI_OST_SC_NON_SPECIFIC_FAILURE = 0x00, 0x01
ACPI_OST_SC_EJECT_NOT_SUPPORTED, ACPI_OST_SC_DEVICE_BUSY = 0x80, 0x82
ACPI_OST_SC_EJECT_IN_PROGRESS = 0x84
STA_USABLE = 0x1 | 0x2 | 0x8  # present, enabled, functioning
MEMORY_DEVICE_HID, CONTAINER_HID = "PNP0C80", "ACPI0004"


@dataclass(slots=True, eq=False)
class AcpiMemoryInfo:
    """One address range of a device, bytes."""

    start_addr: int
    length: int
    enabled: bool = False


@dataclass(slots=True, eq=False)
class AcpiDevice:
    """A node of the ACPI namespace: a memory device, or a container of some."""

    name: str
    hid: str = MEMORY_DEVICE_HID
    dimm: Dimm | None = None
    children: list[AcpiDevice] = field(default_factory=list)
    attached: bool = False
    mgid: int = -1
    res_list: list[AcpiMemoryInfo] = field(default_factory=list)
    physical_nodes: list[int] = field(default_factory=list)
    offlined: bool = False  # a container that user space has taken offline


def acpi_memory_get_device_resources(dimm: Dimm) -> list[AcpiMemoryInfo]:
    """Return the ranges of a device's _CRS; one that continues an earlier one extends it."""
    out: list[AcpiMemoryInfo] = []
    for start, length in dimm.crs if dimm.crs is not None else ((dimm.addr, dimm.size),):
        for info in out:
            if info.start_addr + info.length == start:
                info.length += length
                break
        else:
            out.append(AcpiMemoryInfo(start, length))
    return out


def acpi_get_node(m: Machine, device: AcpiDevice) -> int | None:
    """Return the node of a device's _PXM, or None if firmware gave that domain no node."""
    assert device.dimm is not None
    return m.pxm_to_node.get(device.dimm.node)


def acpi_memory_enable_device(m: Machine, device: AcpiDevice) -> None:
    """Add each range of a device; one success is enough.

    :raises InvalidArgument: if there is nothing to add or nothing could be added.
    """
    ranges = [info for info in device.res_list if info.length]
    if not ranges:
        m.printk(f"acpi {device.name}: device is empty")
        raise kernel_error(-22, "device is empty")
    node = acpi_get_node(m, device)
    if node is None:
        node = memory_add_physaddr_to_nid(m, ranges[0].start_addr)
    total = sum(info.length for info in ranges)
    device.mgid = memory_group_register_static(m, node, -(-total >> PAGE_SHIFT))
    flags = MHP_NID_IS_MGID
    for info in ranges:
        # The flag stays for the ranges that follow, as in the kernel.
        if mhp_supports_memmap_on_memory(m, info.length):
            flags |= MHP_MEMMAP_ON_MEMORY
        try:
            __add_memory(m, device.mgid, info.start_addr, info.length, flags)
        except KernelError as e:
            if e.errno != 17:
                continue
        info.enabled = True
        _bind(m, device, info)
    if not any(info.enabled for info in ranges):
        m.printk(f"acpi {device.name}: add_memory failed")
        raise kernel_error(-22, "add_memory failed")


def _bind(m: Machine, device: AcpiDevice, info: AcpiMemoryInfo) -> None:
    def bind(block: MemoryBlock) -> None:
        block.firmware_node = device.name
        device.physical_nodes.append(block.block_id)

    walk_memory_blocks(m, info.start_addr, info.length, bind)


@traced
def acpi_memory_device_add(m: Machine, device: AcpiDevice) -> bool:
    """Attach the driver to a device that is present; whether it was handled.

    :raises KernelError: if the memory could not be added; the device has no driver then.
    """
    if device.dimm is None or device.dimm.sta & STA_USABLE != STA_USABLE:
        return False
    device.res_list = acpi_memory_get_device_resources(device.dimm)
    try:
        acpi_memory_enable_device(m, device)
    except KernelError:
        m.printk(f"acpi {device.name}: acpi_memory_enable_device() error")
        _device_free(m, device)
        raise
    device.attached = True
    return True


def _device_free(m: Machine, device: AcpiDevice) -> None:
    if device.mgid >= 0:
        try:
            memory_group_unregister(m, device.mgid)
        except KernelError as e:
            m.note_swallowed("memory_group_unregister", e)
    device.mgid = -1
    device.res_list = []


@traced
def acpi_memory_device_remove(m: Machine, device: AcpiDevice) -> None:
    """Detach the driver: unbind and remove every enabled range."""

    def unbind(block: MemoryBlock) -> None:
        block.firmware_node = None

    for info in device.res_list:
        if info.enabled:
            walk_memory_blocks(m, info.start_addr, info.length, unbind)
            __remove_memory(m, info.start_addr, info.length)
    device.physical_nodes.clear()
    _device_free(m, device)
    device.attached = False


@traced
def acpi_bus_attach(m: Machine, device: AcpiDevice) -> None:
    """Attach drivers to a device, then to its children; a driver's failure is not passed on."""
    if device.hid == MEMORY_DEVICE_HID and m.acpi_memhotplug and not device.attached:
        try:
            acpi_memory_device_add(m, device)
        except KernelError as e:
            m.note_swallowed("acpi_bus_attach", e)
    for child in device.children:
        acpi_bus_attach(m, child)
    if device.hid == CONTAINER_HID:
        m.uevent("online", container_devpath(device), "container")


def container_devpath(device: AcpiDevice) -> str:
    """The path of a container's device in uevents."""
    return f"/devices/system/container/{device.name}"


def container_offline(m: Machine, device: AcpiDevice) -> None:
    """Take a container offline, as user space must before it can be ejected.

    :raises Busy: while a memory block of a device in it is online.
    """
    for child in device.children:
        for block_id in child.physical_nodes:
            if m.memory_blocks[block_id].state != "offline":
                raise kernel_error(-16, f"memory{block_id} of {device.name} is online")
    if not device.offlined:
        device.offlined = True
        m.uevent("offline", container_devpath(device), "container")


def container_online(m: Machine, device: AcpiDevice) -> None:
    """Bring a container back online."""
    if device.offlined:
        device.offlined = False
        m.uevent("online", container_devpath(device), "container")


def _offline_pass(
    m: Machine, device: AcpiDevice, put_online: list[MemoryBlock], second: bool
) -> bool:
    """Offline the device's blocks; whether all are offline now."""
    good = True
    for block_id in list(device.physical_nodes):
        block = m.memory_blocks[block_id]
        try:
            if device_offline(m, block) == 0:
                put_online.append(block)
        except KernelError as e:
            m.note_swallowed("acpi_bus_offline", e)
            good = False
            if second:
                m.printk(f"memory memory{block_id}: Offline failed.")
                return False
    return good


def acpi_scan_try_to_offline(m: Machine, device: AcpiDevice) -> None:
    """Take a device's blocks offline, in two passes; a failure brings them back.

    :raises Busy: if a block stays online in the second pass.
    """
    put_online: list[MemoryBlock] = []
    devices = [device, *device.children]
    if all([_offline_pass(m, d, put_online, False) for d in devices]):
        return
    if all(_offline_pass(m, d, put_online, True) for d in devices):
        return
    for block in put_online:
        # Plain online: the zone is chosen anew, as in the kernel.
        try:
            device_online(m, block)
        except KernelError as e:
            m.note_swallowed("acpi_bus_online", e)
    raise kernel_error(-16, f"{device.name} has memory that cannot go offline")


def acpi_scan_hot_remove(m: Machine, device: AcpiDevice) -> None:
    """Offline, detach and eject a device.

    :raises KernelError: EBUSY if it cannot go.
    """
    if device.hid == CONTAINER_HID and not device.offlined:
        m.uevent("change", container_devpath(device), "container")
        raise kernel_error(-16, f"{device.name} has to be taken offline first")
    acpi_scan_try_to_offline(m, device)
    for child in [*device.children, device]:
        if child.attached:
            acpi_memory_device_remove(m, child)
        if child.dimm is not None:
            m.eject_dimm(child.dimm)
            child.dimm = None
    if device.hid == CONTAINER_HID:
        m.acpi_containers.pop(device.name, None)


@traced
def acpi_device_hotplug(m: Machine, device: AcpiDevice, source: int) -> int:
    """Handle a firmware notification and answer it; return the _OST status."""
    try:
        if source in (ACPI_NOTIFY_BUS_CHECK, ACPI_NOTIFY_DEVICE_CHECK):
            acpi_bus_attach(m, device)
        else:
            if device.attached and not m.acpi_memory_enabled:
                m.printk(f"acpi {device.name}: Eject disabled")
                raise kernel_error(-1, "eject is disabled")
            m.ost(device, ACPI_NOTIFY_EJECT_REQUEST, ACPI_OST_SC_EJECT_IN_PROGRESS)
            acpi_scan_hot_remove(m, device)
        status = ACPI_OST_SC_SUCCESS
    except KernelError as e:
        m.note_swallowed("acpi_device_hotplug", e)
        status = {1: ACPI_OST_SC_EJECT_NOT_SUPPORTED, 16: ACPI_OST_SC_DEVICE_BUSY}.get(
            e.errno or 0, ACPI_OST_SC_NON_SPECIFIC_FAILURE
        )
    m.ost(device, source, status)
    return status


def eject_store(m: Machine, device: AcpiDevice, text: str) -> None:
    """Write to a device's ``eject`` file.

    :raises InvalidArgument: unless the first character is 1; NoSuchDevice: without a driver.
    """
    if text[:1] != "1":
        raise kernel_error(-22, f"eject: {text!r}; allowed: 1")
    if not device.attached or not m.acpi_memory_enabled:
        raise kernel_error(-19, f"{device.name} has no driver")
    acpi_device_hotplug(m, device, ACPI_OST_EC_OSPM_EJECT)


# The name in older kernels, for its loop over address ranges.
acpi_memory_device_add_memory = acpi_memory_enable_device
