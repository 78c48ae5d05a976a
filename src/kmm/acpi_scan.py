"""The ACPI namespace: notifications, drivers come and go, ejection (drivers/acpi/scan.c).

Containers are here too (drivers/acpi/container.c): modules that hold memory devices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kmm.acpi_memhotplug import (
    CONTAINER_HID,
    MEMORY_DEVICE_HID,
    AcpiDevice,
    acpi_memory_device_add,
    acpi_memory_device_remove,
    check_removable,
)
from kmm.errors import KernelError, kernel_error
from kmm.firmware import check_methods
from kmm.memory_block import MemoryBlock, device_offline, device_online
from kmm.trace import traced

if TYPE_CHECKING:
    from kmm.machine import Machine

ACPI_NOTIFY_BUS_CHECK, ACPI_NOTIFY_DEVICE_CHECK = 0x00, 0x01
ACPI_NOTIFY_EJECT_REQUEST, ACPI_OST_EC_OSPM_EJECT = 0x03, 0x103
ACPI_OST_SC_SUCCESS, ACPI_OST_SC_NON_SPECIFIC_FAILURE = 0x00, 0x01
ACPI_OST_SC_EJECT_NOT_SUPPORTED, ACPI_OST_SC_DEVICE_BUSY = 0x80, 0x82
ACPI_OST_SC_EJECT_IN_PROGRESS = 0x84
STA_PRESENT, STA_ENABLED = 0x1 | 0x8, 0x2  # as the scan code asks for them
#: Notifications by the words that Machine.notify takes.
NOTIFY_EVENTS = {
    "bus_check": ACPI_NOTIFY_BUS_CHECK,
    "device_check": ACPI_NOTIFY_DEVICE_CHECK,
    "eject_request": ACPI_NOTIFY_EJECT_REQUEST,
}


def _is_present(device: AcpiDevice) -> bool:
    """Whether _STA says present or functioning; a container always is."""
    if device.hid == CONTAINER_HID:
        return True
    return device.dimm is not None and bool(device.dimm.sta & STA_PRESENT)


def acpi_scan_attach_handler(m: Machine, device: AcpiDevice) -> bool:
    """Offer a device to the handler for its id; whether that took it.

    :raises KernelError: what the handler failed with.
    """
    if device.hid == CONTAINER_HID:
        m.uevent("add", container_devpath(device), "container")
        return True
    return m.acpi_memhotplug and acpi_memory_device_add(m, device)


@traced
def acpi_bus_attach(m: Machine, device: AcpiDevice) -> None:
    """Attach drivers to a device, then to its children; a driver's failure is not passed on."""
    if not _is_present(device):
        device.enumerated = False
        return
    if not device.enumerated:
        try:
            device.attached = acpi_scan_attach_handler(m, device)
        except KernelError as e:
            m.note_swallowed("acpi_bus_attach", e)
            return
        device.enumerated = True
    for child in device.children:
        acpi_bus_attach(m, child)
    if device.hid == CONTAINER_HID:
        m.uevent("online", container_devpath(device), "container")


@traced
def acpi_bus_trim(m: Machine, device: AcpiDevice) -> None:
    """Detach drivers from a device's children, the last one first, then from itself."""
    for child in reversed(device.children):
        acpi_bus_trim(m, child)
    if device.attached and device.hid == CONTAINER_HID:
        m.uevent("remove", container_devpath(device), "container")
    elif device.attached:
        acpi_memory_device_remove(m, device)
    device.attached = device.enumerated = False


def _check_can_go(m: Machine, device: AcpiDevice) -> None:
    for each in (device, *device.children):
        if each.attached:
            check_removable(m, each)


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


@traced
def acpi_scan_try_to_offline(m: Machine, device: AcpiDevice) -> None:
    """Take a device's blocks offline, in two passes; a failure brings them back.

    :raises Busy: if a block stays online in the second pass.
    """
    put_online: list[MemoryBlock] = []
    if _offline_pass(m, device, put_online, False) or _offline_pass(m, device, put_online, True):
        return
    for block in put_online:
        # Plain online: the zone is chosen anew, as in the kernel.
        try:
            device_online(m, block)
        except KernelError as e:
            m.note_swallowed("acpi_bus_online", e)
    raise kernel_error(-16, f"{device.name} has memory that cannot go offline")


def acpi_evaluate_ej0(m: Machine, device: AcpiDevice) -> None:
    """Let firmware eject a device, or all that is in a container.

    :raises NoSuchDevice: without an _EJ0; InputOutputError: if it fails.
    """
    for each in (device, *device.children):
        if each.dimm is None:
            continue
        if each is device and each.dimm.ej0 != "ejects":
            if each.dimm.ej0 == "stays":
                return
            code = -19 if each.dimm.ej0 == "missing" else -5
            raise kernel_error(code, f"_EJ0 of {device.name}: {each.dimm.ej0}")
        m.eject_dimm(each.dimm)
        each.dimm = None


@traced
def acpi_scan_hot_remove(m: Machine, device: AcpiDevice) -> None:
    """Offline, detach and eject a device; a container is not taken offline, but has to be.

    :raises Busy: if it cannot go; NoSuchDevice, InputOutputError: if firmware does not eject it,
        its memory is gone then all the same.
    """
    if device.hid != CONTAINER_HID:
        acpi_scan_try_to_offline(m, device)
    elif not device.offlined:
        m.uevent("change", container_devpath(device), "container")
        raise kernel_error(-16, f"{device.name} has to be taken offline first")
    _check_can_go(m, device)
    acpi_bus_trim(m, device)
    acpi_evaluate_ej0(m, device)
    if device.dimm is not None and device.dimm.sta & STA_ENABLED:
        m.printk(
            f"ACPI: \\_SB_.MHPC.MP{device.dimm.slot:02X}: Eject incomplete - "
            f"status {device.dimm.sta:#x}"
        )
    if device.hid == CONTAINER_HID:
        m.acpi_containers.pop(device.name, None)


def acpi_scan_device_not_present(m: Machine, device: AcpiDevice) -> None:
    """Forget a device that is gone.

    :raises KernelError: EALREADY if it was not known.
    """
    if not device.enumerated:
        m.printk(f"acpi {device.name}: Still not present")
        raise kernel_error(-114, f"{device.name} is still not present")
    _check_can_go(m, device)
    acpi_bus_trim(m, device)


def acpi_scan_device_check(m: Machine, device: AcpiDevice) -> None:
    """Attach a device that has come, or forget one that has gone.

    :raises KernelError: EALREADY if it is not there and never was.
    """
    if not _is_present(device):
        acpi_scan_device_not_present(m, device)
    elif not device.attached:
        acpi_bus_attach(m, device)


def acpi_scan_bus_check(m: Machine, device: AcpiDevice) -> None:
    """Look again at a device and at all below it."""
    if not _is_present(device):
        try:
            acpi_scan_device_not_present(m, device)
        except KernelError as e:
            m.note_swallowed("acpi_scan_bus_check", e)
        return
    acpi_bus_attach(m, device)
    for child in device.children:
        acpi_scan_bus_check(m, child)


@traced
def acpi_generic_hotplug_event(m: Machine, device: AcpiDevice, source: int) -> None:
    """Do what a notification asks for.

    :raises KernelError: EPERM if the hot-plug profile forbids it, or what the action failed with.
    """
    if source == ACPI_NOTIFY_BUS_CHECK:
        acpi_scan_bus_check(m, device)
    elif source == ACPI_NOTIFY_DEVICE_CHECK:
        acpi_scan_device_check(m, device)
    else:
        if device.attached and device.hid == MEMORY_DEVICE_HID and not m.acpi_memory_enabled:
            m.printk(f"acpi {device.name}: Eject disabled")
            raise kernel_error(-1, "eject is disabled")
        m.ost(device, ACPI_NOTIFY_EJECT_REQUEST, ACPI_OST_SC_EJECT_IN_PROGRESS)
        acpi_scan_hot_remove(m, device)


@traced
def acpi_device_hotplug(m: Machine, device: AcpiDevice, source: int) -> int:
    """Handle a notification and answer firmware; a failure is told to it, not to the caller.

    :param source: ACPI_NOTIFY_BUS_CHECK, _DEVICE_CHECK, _EJECT_REQUEST, or OSPM_EJECT for sysfs.
    :return: the _OST status: 0 done, 0x80 not supported (EPERM), 0x82 busy (EBUSY), else 0x01.
    :raises InvalidArgument: for a DIMM whose ``sta`` or ``ej0`` was set to what is not allowed;
        ImpossibleState: where the kernel stops, an online block of a device that has gone.
    """
    for each in (device, *device.children):
        if each.dimm is not None:
            check_methods(each.dimm)
    try:
        acpi_generic_hotplug_event(m, device, source)
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
    if device.dimm is not None and device.dimm.ej0 == "missing":
        raise kernel_error(-19, f"{device.name} has no _EJ0")
    acpi_device_hotplug(m, device, ACPI_OST_EC_OSPM_EJECT)
