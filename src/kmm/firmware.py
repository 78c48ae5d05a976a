"""The platform below the kernel: DIMM slots, what it refuses, what its tables say (QEMU's q35)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kmm.errors import FirmwareRefused, check_number, kernel_error, shown
from kmm.params import GiB, MachineConfig, MiB

if TYPE_CHECKING:
    from kmm.machine import Machine

DIMM_ALIGN = 2 * MiB
#: What a DIMM's _EJ0 does: empty the slot, not exist, fail, or succeed and leave the DIMM there.
EJ0 = ("ejects", "missing", "fails", "stays")
LOW_RAM_MAX, LOW_RAM_SPLIT = 0xB0000000, 2 * GiB


@dataclass(slots=True, eq=False)
class Dimm:
    """A DIMM in a slot; bytes.

    ``crs`` overrides its one address range, as (start, length); ``sta`` is what _STA evaluates
    to: present 1, enabled 2, shown 4, functioning 8; ``ej0``, one of EJ0, is what ejecting does.
    The last two may be set while the DIMM is in its slot.
    """

    dimm_id: str
    node: int
    addr: int
    size: int
    slot: int
    crs: tuple[tuple[int, int], ...] | None = None
    sta: int = 0xF
    ej0: str = "ejects"


def check_methods(dimm: Dimm) -> None:
    """Check what was set for a DIMM's _STA and _EJ0.

    :raises InvalidArgument: naming the field, its value and what is allowed.
    """
    check_number("sta", dimm.sta, 0, (1 << 32) - 1)
    if dimm.ej0 not in EJ0:
        raise kernel_error(-22, f"ej0: {dimm.ej0!r}; allowed: {', '.join(EJ0)}")


def check_crs(crs: object) -> tuple[tuple[int, int], ...] | None:
    """Return the ranges of a _CRS, or None for the DIMM's own.

    :raises InvalidArgument: naming the field, its value and what is allowed.
    """
    if crs is None:
        return None
    out = []
    if not isinstance(crs, list | tuple):
        raise kernel_error(-22, f"crs: {crs!r}; allowed: a list of (start, length)")
    for i, pair in enumerate(crs):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise kernel_error(-22, f"crs[{i}]: {pair!r}; allowed: (start, length)")
        start = check_number(f"crs[{i}] start", pair[0], 0, (1 << 64) - 1)
        out.append((start, check_number(f"crs[{i}] length", pair[1], 0, (1 << 64) - 1)))
    return tuple(out)


def check_modules(dimms: object) -> None:
    """Check that what a container is to hold is a list of DIMMs.

    :raises InvalidArgument: naming the field, its value and what is allowed.
    """
    if not isinstance(dimms, list | tuple) or not dimms:
        raise kernel_error(
            -22, f"dimms: {shown(dimms)}; allowed: (id, nid, start, size) of one DIMM or more"
        )
    for i, dimm in enumerate(dimms):
        if not isinstance(dimm, list | tuple) or len(dimm) != 4:
            raise kernel_error(-22, f"dimms[{i}]: {shown(dimm)}; allowed: (id, nid, start, size)")


def ram_layout(config: MachineConfig) -> tuple[int, int]:
    """Return the bytes of RAM below and above 4 GiB."""
    if config.memory >= LOW_RAM_MAX:
        return LOW_RAM_SPLIT, config.memory - LOW_RAM_SPLIT
    return config.memory, 0


def soft_reserved(config: MachineConfig) -> list[tuple[int, int, int]]:
    """Return (start, end, domain) of the special-purpose memory, bytes: it follows the RAM."""
    at = 4 * GiB + ram_layout(config)[1]
    out = []
    for pxm, node in enumerate(config.nodes):
        if node.soft_reserved:
            at = -(-at // GiB) * GiB
            out.append((at, at + node.soft_reserved, pxm))
            at += node.soft_reserved
    return out


def device_memory(config: MachineConfig) -> tuple[int, int]:
    """Return start and length in bytes of the address range for DIMMs."""
    special = soft_reserved(config)
    end = special[-1][1] if special else 4 * GiB + ram_layout(config)[1]
    base = -(-end // GiB) * GiB
    return base, config.maxmem - config.memory + config.slots * GiB


def pxm_to_node_map(config: MachineConfig) -> dict[int, int]:
    """Return node ids by proximity domain, as the kernel gives them out while reading the SRAT.

    CPU entries come first, then memory; QEMU announces the hot-pluggable area for the last
    domain only, so a domain in the middle without CPUs and memory has no node at all.
    "numbered" is the map of a machine whose domains are known by their nodes.
    """
    if config.srat == "numbered":
        return {nid: nid for nid in range(len(config.nodes))}
    order: list[int] = []
    by_cpu = {cpu: pxm for pxm, node in enumerate(config.nodes) for cpu in node.cpus}
    order.extend(by_cpu[cpu] for cpu in sorted(by_cpu))
    order.extend(pxm for pxm, node in enumerate(config.nodes) if node.memory or node.soft_reserved)
    if config.maxmem > config.memory:
        order.append(len(config.nodes) - 1)
    if config.srat == "full":
        order.extend(range(len(config.nodes)))
    return {pxm: nid for nid, pxm in enumerate(dict.fromkeys(order))}


def check_plug(m: Machine, dimm_id: str, node: int, addr: int, size: int) -> int:
    """Return the slot for a new DIMM.

    :raises FirmwareRefused: where QEMU refuses to create the device, in its words.
    """
    if m.dimm_backends is not None:
        # A monitor that makes a backend for each DIMM and never takes one back.
        if dimm_id in m.dimm_backends:
            raise FirmwareRefused(
                f"attempt to add duplicate property 'be-{dimm_id}' to object (type 'container')"
            )
        m.dimm_backends.add(dimm_id)
    elif dimm_id in m.dimms:
        raise FirmwareRefused(f"Duplicate device ID '{dimm_id}'")
    if not dimm_id:
        raise FirmwareRefused("Parameter 'id' expects an identifier")
    nr = len(m.config.nodes)
    if node >= nr:
        raise FirmwareRefused(
            f"'DIMM property node has value {node}' which exceeds the number of numa nodes: {nr}"
        )
    used_slots = {d.slot for d in m.dimms.values()}
    slot = next((s for s in range(m.config.slots) if s not in used_slots), None)
    if slot is None:
        raise FirmwareRefused("no free slots available")
    in_use = sum(d.size for d in m.dimms.values())
    total = m.config.maxmem - m.config.memory
    if in_use + size > total:
        raise FirmwareRefused(
            f"not enough space, currently {in_use:#x} in use of total space for memory devices "
            f"{total:#x}"
        )
    _check_address(m, addr, size)
    return slot


def _check_address(m: Machine, addr: int, size: int) -> None:
    if addr % DIMM_ALIGN:
        raise FirmwareRefused(f"address must be aligned to {DIMM_ALIGN:#x} bytes")
    if size % DIMM_ALIGN or not size:
        raise FirmwareRefused(f"backend memory size must be multiple of {DIMM_ALIGN:#x}")
    base, length = device_memory(m.config)
    if addr < base or addr + size > base + length:
        raise FirmwareRefused(
            f"can't add memory device [{addr:#x}:{size:#x}], usable range for memory devices "
            f"[{base:#x}:{length:#x}]"
        )
    for other in sorted(m.dimms.values(), key=lambda d: d.addr):
        if addr < other.addr + other.size and other.addr < addr + size:
            raise FirmwareRefused(
                f"address range conflicts with memory device id='{other.dimm_id}'"
            )
