"""ACPI memory devices: their _CRS is added and removed (drivers/acpi/acpi_memhotplug.c)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kmm.arch_x86_64 import memory_add_physaddr_to_nid
from kmm.arguments import check_pages_unused
from kmm.errors import KernelError, kernel_error
from kmm.firmware import Dimm
from kmm.memory_block import MemoryBlock, memory_blocks_of, walk_memory_blocks
from kmm.memory_group import memory_group_register_static, memory_group_unregister
from kmm.memory_hotplug import (
    MHP_MEMMAP_ON_MEMORY,
    MHP_NID_IS_MGID,
    __add_memory,
    __remove_memory,
    is_whole_blocks,
    mhp_supports_memmap_on_memory,
)
from kmm.params import PAGE_SHIFT
from kmm.trace import fallible, traced

if TYPE_CHECKING:
    from kmm.machine import Machine

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
    enumerated: bool = False  # a later check finds it known, with a driver or without
    mgid: int = -1
    res_list: list[AcpiMemoryInfo] = field(default_factory=list)
    #: Number of each ``physical_node`` link by the block that it leads to.
    physical_nodes: dict[int, int] = field(default_factory=dict)
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


@fallible
def acpi_memory_enable_device(m: Machine, device: AcpiDevice) -> None:
    """Add each range of a device; one success is enough.

    :raises InvalidArgument: if there is nothing to add or nothing could be added; NoSuchDevice: if
        a block of an added range belongs to another device, the memory stays added then.
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
        acpi_bind_memory_blocks(m, device, info)
    if not any(info.enabled for info in ranges):
        m.printk(f"acpi {device.name}: add_memory failed")
        raise kernel_error(-22, "add_memory failed")


def acpi_bind_memory_blocks(m: Machine, device: AcpiDevice, info: AcpiMemoryInfo) -> None:
    """Link the blocks of a range with their device.

    :raises NoSuchDevice: if one of them has a device already; none of the range is linked then.
    """

    def bind(block: MemoryBlock) -> None:
        if block.firmware_node is not None:
            m.printk(f"memory memory{block.block_id}: ACPI companion already set")
            raise kernel_error(-19, f"memory{block.block_id} belongs to {block.firmware_node}")
        block.firmware_node = device.name
        device.physical_nodes[block.block_id] = len(device.physical_nodes)

    try:
        walk_memory_blocks(m, info.start_addr, info.length, bind)
    except KernelError:
        acpi_unbind_memory_blocks(m, info)
        raise


def acpi_unbind_memory_blocks(m: Machine, info: AcpiMemoryInfo) -> None:
    """Drop the links between the blocks of a range and whatever devices they have."""
    walk_memory_blocks(m, info.start_addr, info.length, lambda block: acpi_unbind_one(m, block))


def acpi_unbind_one(m: Machine, block: MemoryBlock) -> None:
    """Drop the links between a block and its ACPI device, if it has one."""
    if block.firmware_node is not None:
        slot = int(block.firmware_node.partition(":")[2], 16)
        m.acpi_devices[slot].physical_nodes.pop(block.block_id, None)
        block.firmware_node = None


@fallible
def acpi_memory_device_add(m: Machine, device: AcpiDevice) -> bool:
    """Attach the driver to a device; whether it was handled, which needs a usable one.

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
    return True


def _device_free(m: Machine, device: AcpiDevice) -> None:
    if device.mgid >= 0:
        try:
            memory_group_unregister(m, device.mgid)
        except KernelError as e:
            m.note_swallowed("memory_group_unregister", e)
    device.mgid = -1
    device.res_list = []


def check_removable(m: Machine, device: AcpiDevice) -> None:
    """Stop if the kernel would in the middle of removing a device, before anything is changed.

    :raises ImpossibleState: as __remove_memory.
    """
    for info in device.res_list:
        start, size = info.start_addr, info.length
        if not info.enabled:
            continue
        blocks = memory_blocks_of(m, start, size)
        if (
            not is_whole_blocks(m, start, size)
            or any(block.state != "offline" for block in blocks)
            or (size != m.block_size and any(block.nr_vmemmap_pages for block in blocks))
        ):
            # It says why, and the kernel says it in the log.
            __remove_memory(m, start, size)
        check_pages_unused(m, "try_remove_memory", start >> PAGE_SHIFT, size >> PAGE_SHIFT)


@traced
def acpi_memory_device_remove(m: Machine, device: AcpiDevice) -> None:
    """Detach the driver: unbind and remove every enabled range.

    :raises ImpossibleState: if a block is online that this device does not know of.
    """
    for info in device.res_list:
        if info.enabled:
            acpi_unbind_memory_blocks(m, info)
            __remove_memory(m, info.start_addr, info.length)
    _device_free(m, device)


# The name in older kernels, for its loop over address ranges.
acpi_memory_device_add_memory = acpi_memory_enable_device
