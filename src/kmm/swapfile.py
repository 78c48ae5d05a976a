"""The swap device of a machine (mm/swapfile.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kmm._swapfile import SwapDevice
from kmm.errors import ConfigError, OutOfMemory, ValidationError, check_number, kernel_error
from kmm.params import PAGE_SIZE, PHYSMEM_END, SLOT_PFN, SLOT_SWAPPED
from kmm.trace import traced

if TYPE_CHECKING:
    from kmm.machine import Machine

PATH = "/dev/pmem0"
PRIORITY = -2
_OWNER_SHIFT = 40
_HOST_BYTES_OF_SLOT = 16  # its owner and its token


class SwapInfo:
    """A swap device in use (struct swap_info_struct)."""

    def __init__(self, m: Machine, nr_pages: int) -> None:
        try:
            self.device = SwapDevice(m.memmap_engine, nr_pages)
        except MemoryError:
            lacks = f"this host lacks {nr_pages * _HOST_BYTES_OF_SLOT} bytes of memory"
            why = f"size: {nr_pages * PAGE_SIZE}; {lacks} for the table of its slots"
            raise kernel_error(-12, why) from None

    @property
    def pages(self) -> int:
        """How many pages it can hold."""
        return self.device.nr_slots

    @property
    def nr_free(self) -> int:
        """How many more it can hold."""
        return self.device.nr_slots - self.device.nr_used


@traced
def swapon(m: Machine, size: int) -> None:
    """Give a machine a swap device; its first page is a header.

    :param size: bytes, rounded down to pages.
    :raises InvalidArgument: for a size without room; OutOfMemory: for one whose table this host
        has no memory for; KernelError: EBUSY if there is one.
    """
    check_number("size", size, 2 * PAGE_SIZE, PHYSMEM_END + 1)
    if m.swap is not None:
        raise kernel_error(-16, f"size: {size}; there is a swap device already")
    m.swap = SwapInfo(m, size // PAGE_SIZE)
    kib = m.swap.pages * 4
    m.printk(f"Adding {kib}k swap on {PATH}.  Priority:{PRIORITY} extents:1 across:{kib}k SSFS")


def swapon_at_boot(m: Machine) -> None:
    """Give a machine the swap device of its description, if that has one.

    :raises ConfigError: for one whose table this host has no memory for.
    """
    if not m.config.swap:
        return
    try:
        m.swapon(m.config.swap)
    except OutOfMemory as e:
        raise ConfigError(f"machine.swap: {e.why.removeprefix('size: ')}") from None


def swaps(m: Machine) -> str:
    """/proc/swaps."""
    out = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
    if m.swap is not None:
        size, used = m.swap.pages * 4, m.swap.device.nr_used * 4
        out += f"{PATH:<40}partition\t{size}{_tab(size)}\t{used}{_tab(used)}\t{PRIORITY}\n"
    return out


def _tab(number: int) -> str:
    return "\t" if number < 10000000 else ""


def check_swap(m: Machine) -> None:
    """Recount the slots of the swap device and what users have on it.

    :raises ValidationError: at the first disagreement.
    """
    if m.swap is None:
        return
    device = m.swap.device
    taken = np.flatnonzero(device.owner)
    if len(taken) != device.nr_used:
        raise ValidationError(f"swap: {device.nr_used} in use, but recounted {len(taken)}")
    for user in m.users.values():
        slots = user.engine.slots
        at = np.flatnonzero(slots & np.uint64(SLOT_SWAPPED))
        if len(at) != user.engine.nr_swapped:
            raise ValidationError(
                f"{user.name}: {user.engine.nr_swapped} on swap, but recounted {len(at)}"
            )
        want = (np.uint64(user.engine.number << _OWNER_SHIFT) | at.astype(np.uint64)) + np.uint64(1)
        wrong = np.flatnonzero(device.owner[slots[at] & np.uint64(SLOT_PFN)] != want)
        if len(wrong):
            raise ValidationError(f"{user.name}: page {int(at[wrong[0]])}: its slot is another's")
    owned = sum(user.engine.nr_swapped for user in m.users.values())
    if owned != device.nr_used:
        raise ValidationError(f"swap: {device.nr_used} in use, but users have {owned}")
