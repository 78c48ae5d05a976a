"""/sys/devices/system/memory (drivers/base/memory.c)."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from kmm.acpi_memhotplug import acpi_get_node
from kmm.arch_x86_64 import memory_add_physaddr_to_nid
from kmm.errors import KernelError, kernel_error
from kmm.memory_block import (
    MMOP_ONLINE,
    MMOP_ONLINE_KERNEL,
    MMOP_ONLINE_MOVABLE,
    MemoryBlock,
    block_range,
    device_offline,
    device_online,
    state_store,
)
from kmm.memory_failure import hard_offline_page_store, soft_offline_page_store
from kmm.memory_hotplug import __add_memory, zone_for_pfn_range
from kmm.params import ONLINE_TYPES
from kmm.sysfs_acpi import acpi_path
from kmm.sysfs_entry import (
    NUMBER,
    POWER,
    Entry,
    directory,
    kstrtobool,
    kstrtoull,
    link,
    numbered,
    power_file,
    readonly,
    uevent_file,
    word,
)
from kmm.trace import fallible

if TYPE_CHECKING:
    from kmm.machine import Machine

MEMORY = "/sys/devices/system/memory"


@fallible
def probe_store(m: Machine, text: str) -> None:
    """Add the memory block at a physical address that a user writes to ``probe``.

    :raises KernelError: EINVAL for no number or a misaligned one, or what the add fails with.
    """
    if m.config.probe_add and word(text) == "add":
        _add_next_dimm(m)
        return
    addr = kstrtoull(text)
    if addr % m.block_size:
        raise kernel_error(-errno.EINVAL, f"{addr:#x} is no multiple of {m.block_size:#x}")
    __add_memory(m, memory_add_physaddr_to_nid(m, addr), addr, m.block_size)


memory_probe_store = probe_store


def _add_next_dimm(m: Machine) -> None:
    """Add the whole of the DIMM that came first of those that miss a block, to its own node.

    :raises NoSuchDevice: if there is none; KernelError: what the add fails with, nothing is added.
    """
    size = m.block_size
    for dimm in m.dimms.values():
        blocks = range(dimm.addr // size, -(-(dimm.addr + dimm.size) // size))
        if all(b in m.memory_blocks for b in blocks):
            continue
        nid = acpi_get_node(m, m.acpi_devices[dimm.slot])
        if nid is None:
            nid = memory_add_physaddr_to_nid(m, dimm.addr)
        __add_memory(m, nid, dimm.addr, dimm.size)
        return
    raise kernel_error(-errno.ENODEV, "no DIMM waits to be added")


def _auto_online_store(m: Machine, text: str) -> None:
    if word(text) not in ONLINE_TYPES:
        raise kernel_error(
            -errno.EINVAL,
            f"auto_online_blocks: {word(text)!r}; allowed: {', '.join(ONLINE_TYPES)}",
        )
    m.mhp_default_online_type = ONLINE_TYPES.index(word(text))


def _address(text: str) -> int:
    """Return the number of a page's address; what is wrong with it is EINVAL, whatever it is."""
    try:
        return kstrtoull(text)
    except KernelError as e:
        raise kernel_error(-errno.EINVAL, e.why) from None


def _memory_file(m: Machine, match: re.Match[str]) -> Entry | None:
    name = match[1]
    if name == "block_size_bytes":
        return readonly(lambda m: f"{m.block_size:x}\n")
    if name == "auto_online_blocks":
        return Entry(
            0o644, lambda m: ONLINE_TYPES[m.mhp_default_online_type] + "\n", _auto_online_store
        )
    if name == "probe" and m.config.probe:
        return Entry(0o200, write=probe_store)
    if name == "soft_offline_page" and m.config.memory_failure:
        return Entry(0o200, write=lambda m, t: soft_offline_page_store(m, _address(t)))
    if name == "hard_offline_page" and m.config.memory_failure:
        return Entry(0o200, write=lambda m, t: hard_offline_page_store(m, _address(t)))
    if name == "uevent":
        return uevent_file("/devices/system/memory", "memory")
    return None


def _memory_names(m: Machine) -> Iterator[str]:
    fixed = ["auto_online_blocks", "block_size_bytes", "power", "uevent"]
    fixed += ["probe"] * m.config.probe
    fixed += ["hard_offline_page", "soft_offline_page"] * m.config.memory_failure
    yield from fixed
    yield from (f"memory{b}" for b in m.memory_blocks)


def valid_zones_show(m: Machine, block: MemoryBlock) -> str:
    """Return the zones that a block is in, or could be onlined to, the default first."""
    if block.state == "online":
        return f"{block.zone.name if block.zone is not None else 'none'}\n"
    start, nr = block_range(m, block)

    def name(kind: int) -> str:
        return zone_for_pfn_range(m, kind, block.nid, block.group, start, nr).name

    default = name(MMOP_ONLINE)
    others = [n for n in (name(MMOP_ONLINE_KERNEL), name(MMOP_ONLINE_MOVABLE)) if n != default]
    return " ".join([default, *others]) + "\n"


def _online_store(m: Machine, block: MemoryBlock, text: str) -> None:
    if kstrtobool(text):
        device_online(m, block)
    else:
        device_offline(m, block)


#: What the files of a block show, those that tell of it.
BLOCK_SHOWS: dict[str, Callable[[Machine, MemoryBlock], str]] = {
    "online": lambda m, block: "0\n" if block.state == "offline" else "1\n",
    "phys_device": lambda m, block: "0\n",
    "phys_index": lambda m, block: f"{block.block_id:08x}\n",
    "removable": lambda m, block: "1\n",
    "state": lambda m, block: block.state + "\n",
    "valid_zones": valid_zones_show,
}


def _block_file(m: Machine, match: re.Match[str]) -> Entry | None:
    block = m.memory_blocks.get(int(match[1]))
    if block is None:
        return None
    name = match[2]
    show = BLOCK_SHOWS.get(name)
    if show is not None:
        if name == "state":
            return Entry(
                0o644, lambda m: show(m, block), lambda m, t: state_store(m, block, word(t))
            )
        if name == "online":
            return Entry(0o644, lambda m: show(m, block), lambda m, t: _online_store(m, block, t))
        return readonly(lambda m: show(m, block))
    if name == "uevent":
        return uevent_file(block.devpath, "memory")
    if name == "subsystem":
        return link("../../../../bus/memory")
    if name == "firmware_node" and block.firmware_node:
        return link(f"../../../{acpi_path(m, block.firmware_node)}")
    if name == "power":
        return directory(POWER)
    if numbered("node", name) in block.nodes:
        return link(f"../../node/{name}")
    return None


def _block_dir(m: Machine, match: re.Match[str]) -> Entry | None:
    block = m.memory_blocks.get(int(match[1]))
    if block is None:
        return None
    names = [
        "online",
        "phys_device",
        "phys_index",
        "power",
        "removable",
        "state",
        "subsystem",
        "uevent",
        "valid_zones",
    ]
    names += [f"node{n}" for n in block.nodes] + ["firmware_node"] * bool(block.firmware_node)
    return directory(names)


ENTRIES = (
    (MEMORY, lambda m, _: directory(_memory_names(m))),
    (rf"{MEMORY}/memory{NUMBER}", _block_dir),
    (rf"{MEMORY}/(\w+)", _memory_file),
    (rf"{MEMORY}/memory{NUMBER}/(\w+)", _block_file),
    (rf"({MEMORY}(?:/memory[0-9]+)?)/power/(\w+)", power_file),
    (rf"{MEMORY}/power", lambda m, _: directory(POWER)),
)
