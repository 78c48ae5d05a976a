"""Memory blocks as devices: state, online type, writes (drivers/base/memory.c, core.c)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kmm.errors import KernelError, bug, kernel_error
from kmm.mmzone import MemoryGroup, Zone
from kmm.params import ONLINE_TYPES
from kmm.trace import fallible, traced

if TYPE_CHECKING:
    from kmm.machine import Machine

MEM_ONLINE, MEM_GOING_OFFLINE, MEM_OFFLINE = 1, 2, 4
MEM_GOING_ONLINE, MEM_CANCEL_ONLINE, MEM_CANCEL_OFFLINE = 8, 16, 32
ACTION_NAMES = {
    MEM_ONLINE: "MEM_ONLINE",
    MEM_GOING_OFFLINE: "MEM_GOING_OFFLINE",
    MEM_OFFLINE: "MEM_OFFLINE",
    MEM_GOING_ONLINE: "MEM_GOING_ONLINE",
    MEM_CANCEL_ONLINE: "MEM_CANCEL_ONLINE",
    MEM_CANCEL_OFFLINE: "MEM_CANCEL_OFFLINE",
}
MMOP_OFFLINE, MMOP_ONLINE, MMOP_ONLINE_KERNEL, MMOP_ONLINE_MOVABLE = range(4)


@dataclass(slots=True, eq=False)
class MemoryNotify:
    """What a memory notifier is told; pfn and pages, node ids or -1 for no change."""

    start_pfn: int
    nr_pages: int
    status_change_nid_normal: int = -1
    status_change_nid: int = -1


@dataclass(slots=True, eq=False)
class MemoryBlock:
    """One memory block device (struct memory_block)."""

    block_id: int
    state: str
    nid: int = -1
    online_type: int = MMOP_OFFLINE
    zone: Zone | None = None
    nr_vmemmap_pages: int = 0
    group: MemoryGroup | None = None
    nodes: tuple[int, ...] = ()
    firmware_node: str | None = None

    @property
    def devpath(self) -> str:
        """The device's path in uevents."""
        return f"/devices/system/memory/memory{self.block_id}"


@fallible
def memory_notify(m: Machine, action: int, arg: MemoryNotify) -> None:
    """Call the memory notifiers, highest priority first.

    :param action: a MEM_* value; arg: the range and what changes.
    :raises KernelError: what the first notifier that refuses gave (EPERM for NOTIFY_BAD).
    """
    chain = list(m.memory_notifiers)
    for i, notifier in enumerate(chain):
        notifier.missed = False
        code = notifier.call(m, action, arg)
        if code:
            for later in chain[i + 1 :]:
                later.missed = True
            raise kernel_error(code, f"{ACTION_NAMES[action]} refused by {notifier.name}")


def memory_notify_ignored(m: Machine, action: int, arg: MemoryNotify) -> None:
    """Tell the notifiers what has happened; a refusal comes too late and is dropped.

    The kernel ignores what MEM_ONLINE, MEM_OFFLINE and both cancels return.
    """
    try:
        memory_notify(m, action, arg)
    except KernelError as e:
        m.note_swallowed(ACTION_NAMES[action], e)


def memory_blocks_of(m: Machine, start: int, size: int) -> list[MemoryBlock]:
    """Return the existing blocks of a range of bytes, upward."""
    if not size:
        return []
    ids: Sequence[int] = range(start // m.block_size, -(-(start + size) // m.block_size))
    if len(ids) > len(m.memory_blocks):
        # A range may have 2^37 ids, of which most are those of no block.
        ids = sorted(block_id for block_id in m.memory_blocks if block_id in ids)
    return [m.memory_blocks[i] for i in ids if i in m.memory_blocks]


@traced
def walk_memory_blocks(
    m: Machine, start: int, size: int, func: Callable[[MemoryBlock], None]
) -> None:
    """Call a function for each existing block of a range of bytes, upward."""
    for block in memory_blocks_of(m, start, size):
        func(block)


@fallible
def add_memory_block(
    m: Machine, block_id: int, state: str, nr_vmemmap_pages: int, group: MemoryGroup | None
) -> MemoryBlock:
    """Create and announce one block device.

    :raises AlreadyExists: if a block has this id.
    """
    if block_id in m.memory_blocks:
        raise kernel_error(-17, f"memory{block_id} exists")
    block = MemoryBlock(block_id, state, nr_vmemmap_pages=nr_vmemmap_pages, group=group)
    m.memory_blocks[block_id] = block
    if group is not None:
        group.blocks.add(block_id)
    m.uevent("add", block.devpath, "memory")
    return block


@traced
def remove_memory_block(m: Machine, block: MemoryBlock) -> None:
    """Take a block device away again, out of its group and off its firmware device.

    :raises ImpossibleState: if the block is not offline.
    """
    if block.state != "offline":
        bug("remove_memory_block", f"memory{block.block_id} is {block.state}")
    if block.group is not None:
        block.group.blocks.discard(block.block_id)
        block.group = None
    m.ops.device_platform_notify_remove(m, block)
    del m.memory_blocks[block.block_id]
    m.uevent("remove", block.devpath, "memory")


@fallible
def create_memory_block_devices(
    m: Machine, start: int, size: int, vmemmap_pages: int, group: MemoryGroup | None
) -> None:
    """Create the offline block devices of a range of bytes; all or none.

    :param start: first byte; size: bytes, whole blocks; vmemmap_pages: pages at the start of each
        block that hold its own memmap; group: the memory group that they join.
    :raises AlreadyExists: if a block of the range exists.
    """
    first, last = start // m.block_size, (start + size) // m.block_size
    made: list[MemoryBlock] = []
    try:
        for block_id in range(first, last):
            made.append(add_memory_block(m, block_id, "offline", vmemmap_pages, group))
    except KernelError:
        for block in made:
            remove_memory_block(m, block)
        raise


@traced
def remove_memory_block_devices(m: Machine, start: int, size: int) -> None:
    """Unlink and remove the block devices of a range of bytes."""
    for block_id in range(start // m.block_size, (start + size) // m.block_size):
        block = m.memory_blocks.get(block_id)
        if block is not None:
            unregister_memory_block_under_nodes(m, block)
            remove_memory_block(m, block)


@traced
def unregister_memory_block_under_nodes(m: Machine, block: MemoryBlock) -> None:
    """Drop the links between a block and its node."""
    block.nid = -1
    block.nodes = ()


def block_range(m: Machine, block: MemoryBlock) -> tuple[int, int]:
    """Return a block's first pfn and its number of pages."""
    nr = m.block_pages
    return block.block_id * nr, nr


@traced
def memory_block_change_state(m: Machine, block: MemoryBlock, to: str, frm: str) -> None:
    """Run the online or offline action; a failure leaves the state as it was.

    :raises InvalidArgument: if the block is not in the state ``frm``.
    """
    if block.state != frm:
        raise kernel_error(-22, f"memory{block.block_id} is {block.state}, not {frm}")
    if to == "offline":
        block.state = "going-offline"
    try:
        action = m.ops.memory_block_online if to == "online" else m.ops.memory_block_offline
        action(m, block)
    except KernelError:
        block.state = frm
        raise
    block.state = to


@traced
def memory_subsys_online(m: Machine, block: MemoryBlock) -> None:
    """Online a block with its stored online type, which is spent by the attempt.

    :raises KernelError: what online_pages refused with; the block is as before then.
    """
    if block.state == "online":
        return
    if block.online_type == MMOP_OFFLINE:
        block.online_type = MMOP_ONLINE
    try:
        memory_block_change_state(m, block, "online", "offline")
    finally:
        block.online_type = MMOP_OFFLINE


@traced
def memory_subsys_offline(m: Machine, block: MemoryBlock) -> None:
    """Offline a block.

    :raises KernelError: what offline_pages refused with; the block is as before then.
    """
    if block.state == "offline":
        return
    memory_block_change_state(m, block, "offline", "online")


@traced
def device_online(m: Machine, block: MemoryBlock) -> int:
    """Bring a block online; 1 if it was online already, 0 after doing it.

    :raises KernelError: what online_pages refused with; the block is as before then.
    """
    if block.state == "online":
        return 1
    memory_subsys_online(m, block)
    m.uevent("online", block.devpath, "memory")
    return 0


@traced
def device_offline(m: Machine, block: MemoryBlock) -> int:
    """Take a block offline; 1 if it was offline already, 0 after doing it.

    :raises KernelError: what offline_pages refused with; the block is as before then.
    """
    if block.state == "offline":
        return 1
    memory_subsys_offline(m, block)
    m.uevent("offline", block.devpath, "memory")
    return 0


@fallible
def state_store(m: Machine, block: MemoryBlock, word: str) -> None:
    """Write to a block's ``state`` file.

    A word that does not fit an online block is refused, but its online type stays behind for
    the next ``1`` written to ``online``, as in the kernel.

    :raises InvalidArgument: for another word, or if the block is in that state already.
    """
    if word not in ONLINE_TYPES:
        raise kernel_error(-22, f"state: {word!r}; allowed: {', '.join(ONLINE_TYPES)}")
    if word == "offline":
        same = device_offline(m, block)
    else:
        block.online_type = ONLINE_TYPES.index(word)
        same = device_online(m, block)
    if same:
        raise kernel_error(-22, f"memory{block.block_id} is {block.state} already")


@dataclass(slots=True, eq=False)
class MemoryNotifier:
    """A subscriber of the memory notifier chain.

    ``call(m, action, arg)`` returns 0 to agree or a negative errno to refuse, which ends the
    chain: those behind it have ``missed`` that event.  ``asks(m, arg)`` tells without doing
    anything what it would answer to MEM_GOING_OFFLINE; without one nobody knows beforehand.
    """

    name: str
    call: Callable[[Machine, int, MemoryNotify], int]
    priority: int = 0
    missed: bool = False
    asks: Callable[[Machine, MemoryNotify], int] | None = None


def register_memory_notifier(m: Machine, notifier: MemoryNotifier) -> None:
    """Subscribe to the chain; equal priorities are called in order of registration."""
    m.memory_notifiers.append(notifier)
    m.memory_notifiers.sort(key=lambda n: -n.priority)


def unregister_memory_notifier(m: Machine, notifier: MemoryNotifier) -> None:
    """Leave the chain."""
    m.memory_notifiers.remove(notifier)


# The name in older kernels.
register_new_memory = create_memory_block_devices
