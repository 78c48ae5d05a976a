"""Machine descriptions: what is accepted, and errors that name field, value and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest

from kmm import ConfigError, Machine, MachineConfig
from kmm.params import format_list, parse_list, parse_size


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"memory": "1X"}, "machine.memory: '1X' is not a size; allowed"),
        ({"memory": 5}, "machine.memory: 5; allowed: 64M to 64T"),
        ({"memory": "1G", "maxmem": "512M"}, "machine.maxmem: 536870912; allowed"),
        ({"cpus": 0}, "machine.cpus: 0; allowed: a number from 1 to 8192"),
        ({"slots": 257}, "machine.slots: 257; allowed: a number from 0 to 256"),
        ({"colour": "red"}, "machine.colour: 'red'; no such field; allowed: block_size"),
        ({"nodes": 3}, "machine.nodes: 3; allowed: a list of 1 to 64 nodes"),
        ({"nodes": [{"ram": 1}]}, r"machine.nodes\[0\]: .*; allowed: an object"),
        ({"nodes": [{"cpus": "x", "memory": "1G"}]}, r"machine.nodes\[0\].cpus: 'x' is not a list"),
        ({"nodes": [{"cpus": "0-3", "memory": "1G"}]}, "CPU 1; allowed: each of 0 to 0 once"),
        ({"nodes": [{"memory": "512M"}]}, "adds up to 536870912; allowed: machine.memory"),
        ({"distances": [[10, 5]]}, "machine.distances: .*; allowed: 1 rows of 1"),
        ({"block_size": "100M"}, "machine.block_size: 104857600; allowed: a power of two"),
        ({"seed": -1}, "machine.seed: -1; allowed"),
        ({"cmdline": 7}, "machine.cmdline: 7; allowed: text"),
        ({"cmdline": "a='"}, "machine.cmdline: .*quotation"),
        ({"srat": "no"}, "machine.srat: 'no'; allowed: 'qemu', 'full'"),
        ({"probe_add": 1}, "machine.probe_add: 1; allowed: true or false"),
        (7, "machine: 7; allowed: an object"),
    ],
)
def test_mistakes_are_named(data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MachineConfig.from_dict(data)


def test_sizes_and_lists() -> None:
    assert parse_size("512M", "x") == 512 << 20
    assert parse_size("0x1000", "x") == 4096
    assert parse_list("0-2,7", "x") == (0, 1, 2, 7)
    assert format_list([7, 0, 1, 2]) == "0-2,7"
    assert format_list([]) == ""


@pytest.mark.parametrize(
    ("cmdline", "attribute", "value"),
    [
        ("memhp_default_state=online_kernel", "mhp_default_online_type", 2),
        ("memhp_default_state=perhaps", "mhp_default_online_type", 0),
        ("memory_hotplug.memmap_on_memory=1", "memmap_on_memory", True),
        ("memory-hotplug.memmap-on-memory=Y", "memmap_on_memory", True),
        ("memory_hotplug.online_policy=auto-movable", "online_policy", "auto-movable"),
        ("memory_hotplug.auto_movable_ratio=200", "auto_movable_ratio", 200),
        ("memory_hotplug.auto_movable_numa_aware=0", "auto_movable_numa_aware", False),
        ("memory_hotplug.memmap_on_memory=true", "memmap_on_memory", True),
        ("memory_hotplug.memmap_on_memory=ON", "memmap_on_memory", True),
        ("memory_hotplug.memmap_on_memory=maybe", "memmap_on_memory", False),
        ("memory_hotplug.memmap_on_memory", "memmap_on_memory", True),
        ("memory_hotplug.auto_movable_numa_aware=maybe", "auto_movable_numa_aware", True),
        ("memory_hotplug.auto_movable_ratio=0x10", "auto_movable_ratio", 16),
        ("memory_hotplug.auto_movable_ratio=²", "auto_movable_ratio", 301),
        ("movable_node", "movable_node_enabled", True),
        ("acpi_no_memhotplug", "acpi_memhotplug", False),
        ("quiet splash unknown=1", "online_policy", "contig-zones"),
    ],
)
def test_kernel_parameters(cmdline: str, attribute: str, value: object) -> None:
    m = Machine(MachineConfig.from_dict({"cmdline": cmdline}))
    assert getattr(m, attribute) == value
    assert m.read("/proc/cmdline") == cmdline + "\n"
    m.validate()


@pytest.mark.parametrize(
    ("memory", "size"), [("1G", 128), ("63G", 128), ("64G", 1024), ("66G", 2048), ("65G", 1024)]
)
def test_block_size_follows_the_end_of_memory(memory: str, size: int) -> None:
    """A guest takes the largest of 2 GiB, 1 GiB ... that divides the end of its RAM.

    RAM from 2 GiB on lies above 4 GiB, so 64G ends at 66 GiB.
    """
    m = Machine(MachineConfig.from_dict({"memory": memory, "maxmem": "1T"}))
    end = (4 << 30) + (int(memory[:-1]) << 30) - (2 << 30) if memory != "1G" else 1 << 30
    expected = 128 << 20
    if end >= 64 << 30:
        expected = next(s for s in (2 << 30, 1 << 30) if end % s == 0)
    assert m.block_size == expected
    assert size in (128, 1024, 2048)
    m.validate()
