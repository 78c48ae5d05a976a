"""Checks a machine description field by field and turns it into a MachineConfig."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from kmm.errors import ConfigError
from kmm.params import (
    LOCAL_DISTANCE,
    MAX_BLOCK_SIZE,
    MIN_BLOCK_SIZE,
    PHYSMEM_END,
    GiB,
    MachineConfig,
    NodeConfig,
    parse_list,
    parse_size,
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
    "machine",
}


def _integer(data: Mapping[str, Any], key: str, default: int, low: int, high: int) -> int:
    value = data.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"machine.{key}: {value!r}; allowed: a number from {low} to {high}")
    return value


def _flag(data: Mapping[str, Any], key: str, default: bool) -> bool:
    value = data.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"machine.{key}: {value!r}; allowed: true or false")
    return value


def _nodes(data: Mapping[str, Any], cpus: int, memory: int) -> tuple[NodeConfig, ...]:
    raw = data.get("nodes")
    if raw is None:
        return (NodeConfig(tuple(range(cpus)), memory),)
    if not isinstance(raw, list | tuple) or not 1 <= len(raw) <= 64:
        raise ConfigError(f"machine.nodes: {raw!r}; allowed: a list of 1 to 64 nodes")
    out = []
    for i, node in enumerate(raw):
        where = f"machine.nodes[{i}]"
        if not isinstance(node, Mapping) or set(node) - {"cpus", "memory"}:
            raise ConfigError(f"{where}: {node!r}; allowed: an object with 'cpus' and 'memory'")
        text = node.get("cpus", "")
        if not isinstance(text, str | int) or isinstance(text, bool):
            raise ConfigError(f"{where}.cpus: {text!r}; allowed: text like '0-1'")
        size = parse_size(node.get("memory", 0), f"{where}.memory")
        if size % (2 << 20):
            raise ConfigError(f"{where}.memory: {size}; allowed: multiples of 2 MiB")
        out.append(NodeConfig(parse_list(str(text), f"{where}.cpus"), size))
    _check_cpus(out, cpus)
    total = sum(n.memory for n in out)
    if total != memory:
        raise ConfigError(
            f"machine.nodes: their memory adds up to {total}; allowed: machine.memory, {memory}"
        )
    return tuple(out)


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
        nodes[0] = NodeConfig(tuple(sorted({*nodes[0].cpus, *missing})), nodes[0].memory)


def _distances(data: Mapping[str, Any], nr: int) -> tuple[tuple[int, ...], ...]:
    raw = data.get("distances") or ()
    if not raw:
        return ()
    ok = isinstance(raw, list | tuple) and len(raw) == nr
    for i, row in enumerate(raw if ok else ()):
        ok = ok and isinstance(row, list | tuple) and len(row) == nr
        for j, d in enumerate(row if ok else ()):
            ok = ok and isinstance(d, int) and LOCAL_DISTANCE <= d <= 254
            ok = ok and (d == LOCAL_DISTANCE) == (i == j)
    if not ok:
        raise ConfigError(
            f"machine.distances: {raw!r}; allowed: {nr} rows of {nr} numbers from 11 to 254, "
            "10 on the diagonal"
        )
    return tuple(tuple(row) for row in raw)


def _block_size(data: Mapping[str, Any]) -> int | None:
    if data.get("block_size") is None:
        return None
    size = parse_size(data["block_size"], "machine.block_size")
    if size & (size - 1) or not MIN_BLOCK_SIZE <= size <= MAX_BLOCK_SIZE:
        raise ConfigError(
            f"machine.block_size: {size}; allowed: a power of two from {MIN_BLOCK_SIZE} "
            f"to {MAX_BLOCK_SIZE} bytes"
        )
    return size


def parse_cmdline(text: str) -> tuple[tuple[str, str], ...]:
    """Return the kernel parameters as (name, value) in order; dashes and underscores are one."""
    try:
        words = shlex.split(text)
    except ValueError as e:
        raise ConfigError(f"machine.cmdline: {text!r}: {e}") from None
    pairs = (word.partition("=") for word in words)
    return tuple((name.replace("-", "_"), value) for name, _, value in pairs)


def config_from_dict(data: Mapping[str, Any]) -> MachineConfig:
    """Check a machine description and return its MachineConfig (see MachineConfig.from_dict)."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"machine: {data!r}; allowed: an object")
    if unknown := set(data) - _KEYS:
        name = sorted(unknown)[0]
        raise ConfigError(
            f"machine.{name}: {data[name]!r}; no such field; allowed: {', '.join(sorted(_KEYS))}"
        )
    memory = parse_size(data.get("memory", GiB), "machine.memory")
    if not 64 << 20 <= memory <= PHYSMEM_END:
        raise ConfigError(f"machine.memory: {memory}; allowed: 64M to 64T")
    maxmem = parse_size(data.get("maxmem", max(16 * GiB, memory)), "machine.maxmem")
    if not memory <= maxmem <= PHYSMEM_END + 1:
        raise ConfigError(f"machine.maxmem: {maxmem}; allowed: from machine.memory to 64T")
    cpus = _integer(data, "cpus", 1, 1, 8192)
    cmdline = data.get("cmdline", "")
    if not isinstance(cmdline, str):
        raise ConfigError(f"machine.cmdline: {cmdline!r}; allowed: text")
    srat = data.get("srat", "qemu")
    if srat not in ("qemu", "full"):
        raise ConfigError(f"machine.srat: {srat!r}; allowed: 'qemu', 'full'")
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
        cmdline_items=parse_cmdline(cmdline),
    )
