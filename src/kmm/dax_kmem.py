"""The driver that brings a dax device online as System RAM (drivers/dax/kmem.c)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kmm.errors import KernelError, kernel_error
from kmm.memory_group import memory_group_register_static, memory_group_unregister
from kmm.memory_hotplug import MHP_NID_IS_MGID, add_memory_driver_managed, remove_memory
from kmm.params import PAGE_SHIFT
from kmm.resource import (
    IORESOURCE_SYSTEM_RAM,
    Resource,
    __request_region,
    release_resource,
)
from kmm.trace import traced

if TYPE_CHECKING:
    from kmm.dax_bus import DevDax
    from kmm.machine import Machine

KMEM_NAME = "System RAM (kmem)"


def dax_kmem_range(m: Machine, dev_dax: DevDax) -> tuple[int, int]:
    """Return start and end in bytes of the whole memory blocks of a device."""
    start = -(-dev_dax.start // m.block_size) * m.block_size
    return start, dev_dax.end // m.block_size * m.block_size


def _mapping(dev_dax: DevDax, start: int, end: int, what: str) -> str:
    return f"kmem {dev_dax.name}: mapping0: {start:#x}-{end - 1:#x} {what}"


@traced
def dev_dax_kmem_probe(m: Machine, dev_dax: DevDax) -> None:
    """Add the memory of a device, as a memory group of its own.

    :raises InvalidArgument: if no whole memory block is in it; Busy: if its range is taken;
        KernelError: what the add fails with.
    """
    start, end = dax_kmem_range(m, dev_dax)
    if start >= end:
        m.printk(_mapping(dev_dax, dev_dax.start, dev_dax.end, "too small after alignment"))
        m.printk(f"kmem {dev_dax.name}: rejecting DAX region without any memory after alignment")
        raise kernel_error(-errno.EINVAL, f"{dev_dax.name} holds no whole memory block")
    mgid = memory_group_register_static(m, dev_dax.target_node, (end - start) >> PAGE_SHIFT)
    res = None
    try:
        res = _request_mem_region(m, dev_dax, start, end)
        # The RAM goes below it, which a busy resource would not let happen.
        res.flags = IORESOURCE_SYSTEM_RAM
        add_memory_driver_managed(m, mgid, start, end - start, KMEM_NAME, MHP_NID_IS_MGID)
    except KernelError:
        if res is not None:
            m.printk(_mapping(dev_dax, start, end, "memory add failed"))
            release_resource(res)
        memory_group_unregister(m, mgid)
        raise
    dev_dax.res, dev_dax.mgid = res, mgid


def _request_mem_region(m: Machine, dev_dax: DevDax, start: int, end: int) -> Resource:
    try:
        return __request_region(m.iomem_resource, start, end - start, dev_dax.name, 0)
    except KernelError as e:
        m.printk(_mapping(dev_dax, start, end, "could not reserve region"))
        raise kernel_error(-errno.EBUSY, e.why) from None


@traced
def dev_dax_kmem_remove(m: Machine, dev_dax: DevDax) -> None:
    """Remove the memory of a device; what is still online stays, with the device's resource."""
    start, end = dax_kmem_range(m, dev_dax)
    res, mgid = dev_dax.res, dev_dax.mgid
    dev_dax.res, dev_dax.mgid = None, -1
    try:
        remove_memory(m, start, end - start)
    except KernelError as e:
        m.note_swallowed("dev_dax_kmem_remove", e)
        m.printk(_mapping(dev_dax, start, end, "cannot be hotremoved until the next reboot"))
        return
    if res is not None:
        release_resource(res)
    memory_group_unregister(m, mgid)
