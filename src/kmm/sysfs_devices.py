"""The /sys part of the tree: memory blocks, nodes, parameters, firmware, debugfs."""

from __future__ import annotations

import errno
import re
from typing import TYPE_CHECKING

from kmm import procfs
from kmm.acpi_memhotplug import container_offline, container_online, eject_store
from kmm.arch_x86_64 import memory_add_physaddr_to_nid
from kmm.errors import kernel_error
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
from kmm.memory_failure import hard_offline, soft_offline
from kmm.memory_hotplug import __add_memory, zone_for_pfn_range
from kmm.node import node_states_text
from kmm.notifiers import INJECTABLE
from kmm.page_alloc import drain_all_pages
from kmm.params import ONLINE_POLICIES, ONLINE_TYPES, THP_MODES, format_list
from kmm.sysfs_entry import Entry, directory, link, readonly
from kmm.watermarks import set_thp_enabled

if TYPE_CHECKING:
    from kmm.machine import Machine

MEMORY, NODE = "/sys/devices/system/memory", "/sys/devices/system/node"
MODULE = "/sys/module/memory_hotplug/parameters"
ACPI, MEMMAP = "/sys/bus/acpi/devices", "/sys/firmware/memmap"
INJECT = "/sys/kernel/debug/notifier-error-inject/memory/actions"
THP = "/sys/kernel/mm/transparent_hugepage"

_ACTIONS = ("add", "remove", "change", "move", "online", "offline", "bind", "unbind")
_POWER = (
    "async",
    "autosuspend_delay_ms",
    "control",
    "runtime_active_kids",
    "runtime_active_time",
    "runtime_enabled",
    "runtime_status",
    "runtime_suspended_time",
    "runtime_usage",
)


def word(text: str) -> str:
    """Return what sysfs_streq compares: the text without one trailing newline."""
    return text[:-1] if text.endswith("\n") else text


def kstrtobool(text: str) -> bool:
    """Parse a boolean as the kernel does.

    :raises InvalidArgument: for anything else.
    """
    first, second = text[:1], text[1:2]
    if first in ("1", "y", "Y", "t", "T"):
        return True
    if first in ("0", "n", "N", "f", "F"):
        return False
    if first in ("o", "O") and second in ("n", "N"):
        return True
    if first in ("o", "O") and second in ("f", "F"):
        return False
    raise kernel_error(-errno.EINVAL, f"{word(text)!r}; allowed: 1, y, t, on, 0, n, f, off")


def kstrtoull(text: str, bits: int = 64) -> int:
    """Parse an unsigned number with its base read off its prefix.

    :raises InvalidArgument: if it is none; OutOfRange: if it has more than ``bits`` bits.
    """
    match = re.fullmatch(r"\+?(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)\n?", text)
    if not match:
        raise kernel_error(-errno.EINVAL, f"{word(text)!r}; allowed: an unsigned number")
    digits = match[1].lower()
    octal = len(digits) > 1 and digits[0] == "0" and digits[1] != "x"
    value = int(digits, 8 if octal else 0)
    if value >> bits:
        raise kernel_error(-errno.ERANGE, f"{word(text)!r}; allowed: below 2^{bits}")
    return value


def synthetic_uevent(m: Machine, devpath: str, subsystem: str, text: str) -> None:
    """Send the uevent that was written to a device's ``uevent`` file.

    :raises InvalidArgument: for a word that is no action, with the kernel's log lines.
    """
    action = (word(text).split() or [""])[0]
    if action not in _ACTIONS:
        m.printk(f"synth uevent: {devpath}: unknown uevent action string")
        name = devpath.rsplit("/", 1)[1]
        m.printk(f"{subsystem} {name}: uevent: failed to send synthetic uevent: -22")
        raise kernel_error(-errno.EINVAL, f"uevent: {action!r}; allowed: {', '.join(_ACTIONS)}")
    m.uevent(action, devpath, subsystem)


# -- memory -----------------------------------------------------------------------------


def probe_store(m: Machine, text: str) -> None:
    """Add the memory block at a physical address that a user writes to ``probe``.

    :raises KernelError: EINVAL for no number or a misaligned one, or what the add fails with.
    """
    if m.config.probe_add and word(text) == "add":
        known = {b * m.block_size for b in m.memory_blocks}
        waiting = [d for d in sorted(m.dimms.values(), key=lambda d: d.addr) if d.addr not in known]
        if not waiting:
            raise kernel_error(-errno.ENODEV, "no DIMM waits to be added")
        dimm = waiting[0]
        for addr in range(dimm.addr, dimm.addr + dimm.size, m.block_size):
            probe_store(m, f"{addr:#x}\n")
        return
    addr = kstrtoull(text)
    if addr % m.block_size:
        raise kernel_error(-errno.EINVAL, f"{addr:#x} is no multiple of {m.block_size:#x}")
    __add_memory(m, memory_add_physaddr_to_nid(m, addr), addr, m.block_size)


memory_probe_store = probe_store


def _auto_online_store(m: Machine, text: str) -> None:
    if word(text) not in ONLINE_TYPES:
        raise kernel_error(
            -errno.EINVAL,
            f"auto_online_blocks: {word(text)!r}; allowed: {', '.join(ONLINE_TYPES)}",
        )
    m.mhp_default_online_type = ONLINE_TYPES.index(word(text))


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
        return Entry(0o200, write=lambda m, t: soft_offline(m, kstrtoull(t)))
    if name == "hard_offline_page" and m.config.memory_failure:
        return Entry(0o200, write=lambda m, t: hard_offline(m, kstrtoull(t)))
    if name == "uevent":
        return Entry(
            0o644,
            lambda m: "",
            lambda m, t: synthetic_uevent(m, "/devices/system/memory", "memory", t),
        )
    return None


def _memory_names(m: Machine) -> list[str]:
    fixed = ["auto_online_blocks", "block_size_bytes", "power", "uevent"]
    fixed += ["probe"] * m.config.probe
    fixed += ["hard_offline_page", "soft_offline_page"] * m.config.memory_failure
    return fixed + [f"memory{b}" for b in m.memory_blocks]


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


def _block_file(m: Machine, match: re.Match[str]) -> Entry | None:
    block = m.memory_blocks.get(int(match[1]))
    if block is None:
        return None
    name = match[2]
    shows = {
        "removable": lambda m: "1\n",
        "phys_index": lambda m: f"{block.block_id:08x}\n",
        "phys_device": lambda m: "0\n",
        "valid_zones": lambda m: valid_zones_show(m, block),
    }
    if name in shows:
        return readonly(shows[name])
    if name == "state":
        return Entry(
            0o644, lambda m: f"{block.state}\n", lambda m, t: state_store(m, block, word(t))
        )
    if name == "online":
        return Entry(
            0o644,
            lambda m: f"{int(block.state != 'offline')}\n",
            lambda m, t: _online_store(m, block, t),
        )
    if name == "uevent":
        return Entry(
            0o644, lambda m: "", lambda m, t: synthetic_uevent(m, block.devpath, "memory", t)
        )
    if name == "subsystem":
        return link("../../../../bus/memory")
    if name == "firmware_node" and block.firmware_node:
        return link(f"../../../LNXSYSTM:00/LNXSYBUS:00/PNP0A06:04/{block.firmware_node}")
    if name == "power":
        return directory(_POWER)
    if name.startswith("node") and name[4:].isdigit() and int(name[4:]) in block.nodes:
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


def _power_file(m: Machine, match: re.Match[str]) -> Entry | None:
    path, name = match[1], match[2]
    texts = {
        "async": "disabled\n",
        "control": "auto\n",
        "runtime_status": "unsupported\n",
        "runtime_enabled": "disabled\n",
    }
    if name == "control":
        key = f"{path}/power/control"

        def store(m: Machine, text: str) -> None:
            if word(text) not in ("auto", "on"):
                raise kernel_error(-errno.EINVAL, f"control: {word(text)!r}; allowed: auto, on")
            m.sysfs_values[key] = word(text) + "\n"

        return Entry(0o644, lambda m: m.sysfs_values.get(key, "auto\n"), store)
    if name in _POWER:
        return readonly(lambda m: texts.get(name, "0\n"))
    return None


# -- nodes ------------------------------------------------------------------------------


def _node_mask(m: Machine, match: re.Match[str]) -> Entry | None:
    if match[1] == "uevent":
        return Entry(
            0o644, lambda m: "", lambda m, t: synthetic_uevent(m, "/devices/system/node", "node", t)
        )
    if match[1] not in node_states_text(m):
        return None
    return readonly(lambda m: format_list(sorted(node_states_text(m)[match[1]])) + "\n")


def _distance(m: Machine, nid: int) -> str:
    return " ".join(str(m.node_distance(nid, n)) for n in sorted(m.n_online)) + "\n"


def _cpumap(m: Machine, nid: int) -> str:
    mask = sum(1 << cpu for cpu in m.cpus_of_node(nid))
    width = m.nr_cpus
    words = []
    while width > 0:
        words.append(f"{mask & 0xFFFFFFFF:0{-(-min(width, 32) // 4)}x}")
        mask, width = mask >> 32, width - 32
    return ",".join(reversed(words)) + "\n"


def _numastat(m: Machine, nid: int) -> str:
    zones = m.nodes[nid].zones
    names = (
        ("numa_hit",) * 2,
        ("numa_miss",) * 2,
        ("numa_foreign",) * 2,
        ("interleave_hit", "numa_interleave"),
        ("local_node", "numa_local"),
        ("other_node", "numa_other"),
    )
    return "".join(f"{a} {sum(z.vmstat.get(b, 0) for z in zones)}\n" for a, b in names)


def _node_file(m: Machine, match: re.Match[str]) -> Entry | None:
    nid, name = int(match[1]), match[2]
    if nid not in m.node_devices:
        return None
    shows = {
        "cpulist": lambda m: format_list(m.cpus_of_node(nid)) + "\n",
        "cpumap": lambda m: _cpumap(m, nid),
        "distance": lambda m: _distance(m, nid),
        "meminfo": lambda m: procfs.node_meminfo(m, nid),
        "numastat": lambda m: _numastat(m, nid),
        "vmstat": lambda m: procfs.vmstat_lines(m, m.nodes[nid]),
    }
    if name in shows:
        return readonly(shows[name])
    if name == "compact":
        return Entry(0o200, write=lambda m, t: drain_all_pages(m))
    if name == "uevent":
        path = f"/devices/system/node/node{nid}"
        return Entry(0o644, lambda m: "", lambda m, t: synthetic_uevent(m, path, "node", t))
    if name == "subsystem":
        return link("../../../../bus/node")
    if name == "power":
        return directory(_POWER)
    if name.startswith("memory") and name[6:].isdigit():
        block = m.memory_blocks.get(int(name[6:]))
        return link(f"../../memory/{name}") if block is not None and nid in block.nodes else None
    if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in m.cpus_of_node(nid):
        return link(f"../../cpu/{name}")
    return None


def _node_dir(m: Machine, match: re.Match[str]) -> Entry | None:
    nid = int(match[1])
    if nid not in m.node_devices:
        return None
    names = [
        "compact",
        "cpulist",
        "cpumap",
        "distance",
        "meminfo",
        "numastat",
        "power",
        "subsystem",
        "uevent",
        "vmstat",
    ]
    names += [f"cpu{c}" for c in m.cpus_of_node(nid)]
    return directory(
        names + [f"memory{b.block_id}" for b in m.memory_blocks.values() if nid in b.nodes]
    )


# -- parameters, firmware, debugfs -------------------------------------------------------


def _policy_store(m: Machine, text: str) -> None:
    if word(text) not in ONLINE_POLICIES:
        raise kernel_error(
            -errno.EINVAL, f"online_policy: {word(text)!r}; allowed: {', '.join(ONLINE_POLICIES)}"
        )
    m.online_policy = word(text)


def _ratio_store(m: Machine, text: str) -> None:
    m.auto_movable_ratio = kstrtoull(text, 32)


def _numa_aware_store(m: Machine, text: str) -> None:
    m.auto_movable_numa_aware = kstrtobool(text)


def _parameter(m: Machine, match: re.Match[str]) -> Entry | None:
    return {
        "online_policy": Entry(0o644, lambda m: m.online_policy + "\n", _policy_store),
        "auto_movable_ratio": Entry(0o644, lambda m: f"{m.auto_movable_ratio}\n", _ratio_store),
        "auto_movable_numa_aware": Entry(
            0o644, lambda m: "Y\n" if m.auto_movable_numa_aware else "N\n", _numa_aware_store
        ),
        "memmap_on_memory": readonly(lambda m: "Y\n" if m.memmap_on_memory else "N\n"),
    }.get(match[1])


def _memmap_file(m: Machine, match: re.Match[str]) -> Entry | None:
    entry = m.firmware_map.get(int(match[1]))
    if entry is None:
        return None
    texts = {"start": f"{entry[0]:#x}\n", "end": f"{entry[1]:#x}\n", "type": f"{entry[2]}\n"}
    return readonly(lambda m: texts[match[2]]) if match[2] in texts else None


def _memmap_dir(m: Machine, match: re.Match[str]) -> Entry | None:
    if match[1] is None:
        return directory(str(k) for k in m.firmware_map)
    return directory(("end", "start", "type")) if int(match[1]) in m.firmware_map else None


def _acpi_enabled_store(m: Machine, text: str) -> None:
    number = kstrtoull(text)
    if number > 1:
        raise kernel_error(-errno.EINVAL, f"enabled: {number}; allowed: 0, 1")
    m.acpi_memory_enabled = bool(number)


def _acpi_file(m: Machine, match: re.Match[str]) -> Entry | None:
    device = next((d for d in m.acpi_devices if d.name == match[1]), None)
    if device is None:
        return None
    texts = {"hid": f"{device.hid}\n", "status": "15\n" if device.dimm else "0\n"}
    if match[2] is None:
        names = ["eject", "hid", "status"]
        suffix = ["" if i == 0 else str(i) for i in range(len(device.physical_nodes))]
        return directory(names + [f"physical_node{s}" for s in suffix])
    name = match[2]
    if name == "eject":
        return Entry(0o200, write=lambda m, t: eject_store(m, device, t))
    number = re.fullmatch(r"physical_node(\d*)", name)
    if number and int(number[1] or 0) < len(device.physical_nodes):
        block = device.physical_nodes[int(number[1] or 0)]
        return link(f"../../../../system/memory/memory{block}")
    return readonly(lambda m: texts[name]) if name in texts else None


def _container_file(m: Machine, match: re.Match[str]) -> Entry | None:
    device = m.acpi_containers.get(match[1])
    if device is None:
        return None
    if match[2] is None:
        return directory(("online", "uevent"))

    def store(m: Machine, text: str) -> None:
        (container_online if kstrtobool(text) else container_offline)(m, device)

    if match[2] == "online":
        return Entry(0o644, lambda m: f"{int(not device.offlined)}\n", store)
    if match[2] == "uevent":
        path = f"/devices/system/container/{device.name}"
        return Entry(0o644, lambda m: "", lambda m, t: synthetic_uevent(m, path, "container", t))
    return None


def _inject_file(m: Machine, match: re.Match[str]) -> Entry | None:
    name = match[1]
    if name not in INJECTABLE:
        return None

    def store(m: Machine, text: str) -> None:
        match_ = re.fullmatch(r"\s*(-?(?:0[xX][0-9a-fA-F]+|\d+))\s*", text)
        value = int(match_[1], 0) if match_ else 1
        if match_ is None or not -4095 <= value <= 0:
            raise kernel_error(-errno.EINVAL, f"error: {word(text)!r}; allowed: 0 to -4095")
        m.notifier_errors[name] = value

    return Entry(0o644, lambda m: f"{m.notifier_errors.get(name, 0)}\n", store)


def _thp_file(m: Machine, match: re.Match[str]) -> Entry | None:
    def show(m: Machine) -> str:
        return " ".join(f"[{w}]" if w == m.vm.thp_enabled else w for w in THP_MODES) + "\n"

    def store(m: Machine, text: str) -> None:
        if word(text) not in THP_MODES:
            raise kernel_error(
                -errno.EINVAL, f"enabled: {word(text)!r}; allowed: {', '.join(THP_MODES)}"
            )
        set_thp_enabled(m, word(text))

    return Entry(0o644, show, store)


def canonical(m: Machine, path: str) -> str:
    """Return a path with the links inside it resolved (a node's block, a bus's device)."""
    path = re.sub(r"/+", "/", path).rstrip("/") or "/"
    path = re.sub(r"^/sys/bus/(memory|node)/devices/", r"/sys/devices/system/\1/", path)
    for _ in range(4):
        match = re.match(rf"{NODE}/node(\d+)/memory(\d+)(/.+)$", path)
        if match:
            block = m.memory_blocks.get(int(match[2]))
            if block is None or int(match[1]) not in block.nodes:
                return path
            path = f"{MEMORY}/memory{match[2]}{match[3]}"
            continue
        match = re.match(rf"{MEMORY}/memory(\d+)/node(\d+)(/.+)$", path)
        if match:
            block = m.memory_blocks.get(int(match[1]))
            if block is None or int(match[2]) not in block.nodes:
                return path
            path = f"{NODE}/node{match[2]}{match[3]}"
            continue
        break
    return path


ENTRIES = (
    (rf"{MEMORY}", lambda m, _: directory(_memory_names(m))),
    (
        rf"{NODE}",
        lambda m, _: directory(
            [*node_states_text(m), "uevent", "power", *(f"node{n}" for n in m.node_devices)]
        ),
    ),
    (rf"{MEMORY}/memory(\d+)", _block_dir),
    (rf"{MEMORY}/(\w+)", _memory_file),
    (rf"{MEMORY}/memory(\d+)/(\w+)", _block_file),
    (rf"({MEMORY}/memory\d+|{NODE}/node\d+|{MEMORY}|{NODE})/power/(\w+)", _power_file),
    (rf"(?:{MEMORY}|{NODE})/power", lambda m, _: directory(_POWER)),
    (rf"{NODE}/node(\d+)", _node_dir),
    (rf"{NODE}/(\w+)", _node_mask),
    (rf"{NODE}/node(\d+)/(\w+)", _node_file),
    (rf"{MODULE}/(\w+)", _parameter),
    (rf"{MEMMAP}(?:/(\d+))?", _memmap_dir),
    (rf"{MEMMAP}/(\d+)/(\w+)", _memmap_file),
    (
        r"/sys/firmware/acpi/hotplug/memory/enabled",
        lambda m, _: (
            Entry(0o644, lambda m: f"{int(m.acpi_memory_enabled)}\n", _acpi_enabled_store)
            if m.acpi_memhotplug
            else None
        ),
    ),
    (rf"{ACPI}", lambda m, _: directory(d.name for d in m.acpi_devices)),
    (rf"{ACPI}/([\w:]+)(?:/(\w+))?", _acpi_file),
    (
        r"/sys/bus/memory/devices",
        lambda m, _: directory(f"memory{b}" for b in m.memory_blocks),
    ),
    (r"/sys/bus/node/devices", lambda m, _: directory(f"node{n}" for n in m.node_devices)),
    (r"/sys/devices/system/container", lambda m, _: directory(m.acpi_containers)),
    (r"/sys/devices/system/container/([\w:]+)(?:/(\w+))?", _container_file),
    (rf"{INJECT}/(\w+)/error", _inject_file),
    (rf"{INJECT}/(?:{'|'.join(INJECTABLE)})", lambda m, _: directory(("error",))),
    (rf"{THP}/enabled", _thp_file),
)

DIRECTORIES: dict[str, tuple[str, ...]] = {
    "/sys": ("bus", "devices", "firmware", "kernel", "module"),
    "/sys/devices": ("system",),
    "/sys/devices/system": ("container", "memory", "node"),
    "/sys/bus": ("acpi", "memory", "node"),
    "/sys/bus/acpi": ("devices",),
    "/sys/bus/memory": ("devices",),
    "/sys/bus/node": ("devices",),
    "/sys/module": ("memory_hotplug",),
    "/sys/module/memory_hotplug": ("parameters",),
    MODULE: ("auto_movable_numa_aware", "auto_movable_ratio", "memmap_on_memory", "online_policy"),
    "/sys/firmware": ("acpi", "memmap"),
    "/sys/firmware/acpi": ("hotplug",),
    "/sys/firmware/acpi/hotplug": ("memory",),
    "/sys/firmware/acpi/hotplug/memory": ("enabled",),
    "/sys/kernel": ("debug", "mm"),
    "/sys/kernel/mm": ("transparent_hugepage",),
    THP: ("enabled",),
    "/sys/kernel/debug": ("notifier-error-inject",),
    "/sys/kernel/debug/notifier-error-inject": ("memory",),
    "/sys/kernel/debug/notifier-error-inject/memory": ("actions",),
    INJECT: INJECTABLE,
}
