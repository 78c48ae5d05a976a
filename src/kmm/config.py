"""Checks a machine description field by field and turns it into a MachineConfig."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from kmm.errors import ConfigError, shown
from kmm.params import (
    LOCAL_DISTANCE,
    MAX_BLOCK_SIZE,
    MAX_NR_ZONES,
    MIN_BLOCK_SIZE,
    PAGE_SIZE,
    PHYSMEM_END,
    PMD_SIZE,
    GiB,
    MachineConfig,
    MiB,
    NodeConfig,
    parse_list,
    parse_size,
    whole_number,
)

# "machine" names QEMU's board in recordings; kmm models the one that all of them use.
_KEYS = {
    "memory",
    "maxmem",
    "slots",
    "cpus",
    "nodes",
    "distances",
    "cmdline",
    "block_size",
    "seed",
    "srat",
    "probe",
    "probe_add",
    "hypervisor",
    "struct_page_size",
    "swap",
    "pdpe1gb",
    "machine",
}

_NODE_KEYS = ("cpus", "memory", "soft_reserved")

# Space, as far as it is ASCII, for the kernel's isspace().
_SPACE = " \t\n\v\f\r"
# Bytes of a struct page without and with memory cgroups.
STRUCT_PAGE_SIZES = (56, 64)
MAX_CPUS = 8192
# As many as the engine's node masks have bits.
MAX_NODES = 64
# 255 says in a SLIT that a node cannot be reached.
MAX_DISTANCE = 254
# The hole below 4 GiB, of 2 GiB in a large machine, takes its part of the addresses.
MIN_MEMORY, MAX_MEMORY = 64 * MiB, PHYSMEM_END + 1 - 2 * GiB


def _integer(data: Mapping[str, Any], key: str, default: int, low: int, high: int) -> int:
    value = data.get(key, default)
    number = whole_number(value)
    if number is None or not low <= number <= high:
        raise ConfigError(f"machine.{key}: {shown(value)}; allowed: a number from {low} to {high}")
    return number


def _text(data: Mapping[str, Any], key: str) -> str:
    value = data.get(key, "")
    if not isinstance(value, str):
        raise ConfigError(f"machine.{key}: {shown(value)}; allowed: text")
    return value


def _flag(data: Mapping[str, Any], key: str, default: bool) -> bool:
    value = data.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"machine.{key}: {shown(value)}; allowed: true or false")
    return value


def _nodes(data: Mapping[str, Any], cpus: int, memory: int) -> tuple[NodeConfig, ...]:
    raw = data.get("nodes")
    if raw is None:
        return (NodeConfig(tuple(range(cpus)), memory),)
    if not isinstance(raw, list | tuple) or not 1 <= len(raw) <= MAX_NODES:
        raise ConfigError(f"machine.nodes: {shown(raw)}; allowed: a list of 1 to 64 nodes")
    out = []
    for i, node in enumerate(raw):
        where = f"machine.nodes[{i}]"
        allowed = f"allowed: an object with {', '.join(_NODE_KEYS)}"
        if not isinstance(node, Mapping):
            raise ConfigError(f"{where}: {shown(node)}; {allowed}")
        for key in node:
            if key not in _NODE_KEYS:
                raise ConfigError(f"{where}.{key}: {shown(node[key])}; {allowed}")
        cpus_of_node = _cpu_list(node.get("cpus", ""), f"{where}.cpus")
        size = parse_size(node.get("memory", 0), f"{where}.memory")
        if size % PMD_SIZE:
            raise ConfigError(f"{where}.memory: {shown(size)}; allowed: multiples of 2 MiB")
        out.append(NodeConfig(cpus_of_node, size, _soft_reserved(node, where)))
    _check_cpus(out, cpus)
    total = sum(n.memory for n in out)
    if total != memory:
        raise ConfigError(
            f"machine.nodes: their memory adds up to {shown(total)}; "
            f"allowed: machine.memory, {memory}"
        )
    return tuple(out)


def _soft_reserved(node: Mapping[str, Any], where: str) -> int:
    size = parse_size(node.get("soft_reserved", 0), f"{where}.soft_reserved")
    if size % PMD_SIZE or size > PHYSMEM_END:
        raise ConfigError(
            f"{where}.soft_reserved: {shown(size)}; allowed: multiples of 2 MiB below 64T"
        )
    return size


def _cpu_list(value: Any, where: str) -> tuple[int, ...]:
    if isinstance(value, str):
        return parse_list(value, where)
    numbers = [whole_number(v) for v in (value if isinstance(value, list | tuple) else [value])]
    good = tuple(n for n in numbers if n is not None and 0 <= n < MAX_CPUS)
    if len(good) != len(numbers):
        raise ConfigError(f"{where}: {shown(value)}; allowed: text like '0-1', or numbers of CPUs")
    return good


def _check_cpus(nodes: list[NodeConfig], cpus: int) -> None:
    seen: set[int] = set()
    for i, node in enumerate(nodes):
        for cpu in node.cpus:
            if cpu >= cpus or cpu in seen:
                raise ConfigError(
                    f"machine.nodes[{i}].cpus: CPU {cpu}; allowed: each of 0 to {cpus - 1} once"
                )
            seen.add(cpu)
    if missing := set(range(cpus)) - seen:
        # As QEMU does: a CPU that no node names belongs to the first.
        nodes[0] = replace(nodes[0], cpus=tuple(sorted({*nodes[0].cpus, *missing})))


def _distances(data: Mapping[str, Any], nr: int) -> tuple[tuple[int, ...], ...]:
    raw = data.get("distances")
    if raw is None or raw == () or raw == []:
        return ()
    ok = isinstance(raw, list | tuple) and len(raw) == nr
    for i, row in enumerate(raw if ok else ()):
        ok = ok and isinstance(row, list | tuple) and len(row) == nr
        for j, d in enumerate(row if ok else ()):
            number = whole_number(d)
            ok = ok and number is not None and LOCAL_DISTANCE <= number <= MAX_DISTANCE
            ok = ok and (number == LOCAL_DISTANCE) == (i == j)
    if not ok:
        raise ConfigError(
            f"machine.distances: {shown(raw)}; allowed: {nr} rows of {nr} numbers from 11 to "
            f"{MAX_DISTANCE}, "
            "10 on the diagonal"
        )
    return tuple(tuple(int(d) for d in row) for row in raw)


def _block_size(data: Mapping[str, Any]) -> int | None:
    if data.get("block_size") is None:
        return None
    size = parse_size(data["block_size"], "machine.block_size")
    if size & (size - 1) or not MIN_BLOCK_SIZE <= size <= MAX_BLOCK_SIZE:
        raise ConfigError(
            f"machine.block_size: {shown(size)}; allowed: a power of two from {MIN_BLOCK_SIZE} "
            f"to {MAX_BLOCK_SIZE} bytes"
        )
    return size


def parse_cmdline(text: str) -> tuple[tuple[str, str | None], ...]:
    """Split a kernel command line as the kernel does (parse_args, next_arg in kernel/params.c).

    Only double quotes keep words together; what follows a word ``--`` is init's.

    :param text: the line; every text is one.
    :return: (name, value) in order, value None for a word without ``=``; dashes of a name are
        underscores, which the kernel takes for the same.
    """
    out: list[tuple[str, str | None]] = []
    for word in _words(text):
        quoted = word.startswith('"')
        word = word[quoted:]
        # An equals sign that begins a word belongs to its name.
        at = word.find("=", 1)
        opened = quoted or (at > 0 and word.startswith('"', at + 1))
        if opened:
            word = word.removesuffix('"')
        if at < 0:
            name, value = word, None
        else:
            name, value = word[:at], word[at + 1 :].removeprefix('"')
        if value is None and name == "--":
            break
        out.append((name.replace("-", "_"), value))
    return tuple(out)


def _words(text: str) -> Iterator[str]:
    start, quoted = None, False
    for i, char in enumerate(text):
        if char in _SPACE and not quoted:
            if start is not None:
                yield text[start:i]
            start = None
            continue
        if start is None:
            start = i
        quoted ^= char == '"'
    if start is not None:
        yield text[start:]


def config_from_dict(data: Mapping[str, Any]) -> MachineConfig:
    """Check a machine description and return its MachineConfig.

    :param data: the fields of MachineConfig.from_dict.
    :raises ConfigError: naming the field, its value and what is allowed.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"machine: {shown(data)}; allowed: an object")
    if unknown := set(data) - _KEYS:
        name = min(unknown, key=str)
        raise ConfigError(
            f"machine.{name}: {shown(data[name])}; no such field; "
            f"allowed: {', '.join(sorted(_KEYS))}"
        )
    memory = parse_size(data.get("memory", GiB), "machine.memory")
    if not MIN_MEMORY <= memory <= MAX_MEMORY or memory % PMD_SIZE:
        raise ConfigError(
            f"machine.memory: {shown(memory)}; allowed: 64M to 65534G, multiples of 2 MiB"
        )
    maxmem = parse_size(data.get("maxmem", max(16 * GiB, memory)), "machine.maxmem")
    if not memory <= maxmem <= PHYSMEM_END + 1:
        raise ConfigError(f"machine.maxmem: {shown(maxmem)}; allowed: from machine.memory to 64T")
    cpus = _integer(data, "cpus", 1, 1, MAX_CPUS)
    cmdline = _text(data, "cmdline")
    _text(data, "machine")
    srat = data.get("srat", "qemu")
    if srat not in ("qemu", "full"):
        raise ConfigError(f"machine.srat: {shown(srat)}; allowed: 'qemu', 'full'")
    page_size = whole_number(data.get("struct_page_size", 64))
    if page_size not in STRUCT_PAGE_SIZES:
        value = shown(data["struct_page_size"])
        raise ConfigError(f"machine.struct_page_size: {value}; allowed: 56, 64")
    nodes = _nodes(data, cpus, memory)
    return MachineConfig(
        memory=memory,
        maxmem=maxmem,
        slots=_integer(data, "slots", 16, 0, 256),
        cpus=cpus,
        nodes=nodes,
        distances=_distances(data, len(nodes)),
        cmdline=cmdline,
        block_size=_block_size(data),
        seed=_integer(data, "seed", 0, 0, (1 << 64) - 1),
        srat=srat,
        probe=_flag(data, "probe", True),
        probe_add=_flag(data, "probe_add", False),
        hypervisor=_flag(data, "hypervisor", True),
        struct_page_size=page_size,
        swap=_swap_size(data),
        pdpe1gb=_flag(data, "pdpe1gb", True),
        cmdline_items=parse_cmdline(cmdline),
    )


def _swap_size(data: Mapping[str, Any]) -> int:
    size = parse_size(data.get("swap", 0), "machine.swap")
    if size and not 2 * PAGE_SIZE <= size <= PHYSMEM_END + 1:
        raise ConfigError(f"machine.swap: {shown(size)}; allowed: 0, or from 8192 bytes to 64T")
    return size


def check_config(config: Any) -> MachineConfig:
    """Check a MachineConfig that was built by hand, by the rules of a machine description.

    :return: the same with its command line split, and with CPUs that no node names in the first.
    :raises ConfigError: naming the field, its value and what is allowed.
    """
    if not isinstance(config, MachineConfig):
        raise ConfigError(f"config: {shown(config)}; allowed: a MachineConfig (see from_dict)")
    data = {key: getattr(config, key) for key in _KEYS - {"machine", "nodes", "srat"}}
    for key in ("memory", "maxmem", "block_size", "swap"):
        if isinstance(data[key], str):
            raise ConfigError(f"machine.{key}: {shown(data[key])}; allowed: a number of bytes")
    if not isinstance(config.nodes, tuple) or not all(
        isinstance(node, NodeConfig) and not isinstance(node.memory, str) for node in config.nodes
    ):
        raise ConfigError(f"machine.nodes: {shown(config.nodes)}; allowed: a tuple of NodeConfig")
    data["nodes"] = [{key: getattr(node, key) for key in _NODE_KEYS} for node in config.nodes]
    if config.srat != "numbered":
        data["srat"] = config.srat
    zones = config.zones
    if not isinstance(zones, tuple) or any(z not in range(MAX_NR_ZONES) for z in zones):
        raise ConfigError(f"machine.zones: {shown(zones)}; allowed: numbers from 0 to 4")
    return replace(
        config_from_dict(data),
        srat=config.srat,
        zones=zones,
        memory_failure=_flag({"memory_failure": config.memory_failure}, "memory_failure", True),
    )
