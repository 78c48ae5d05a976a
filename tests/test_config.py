"""Machine descriptions: what is accepted, and errors that name field, value and what is allowed."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmm import ConfigError, Machine, MachineConfig, NodeConfig
from kmm.config import parse_cmdline
from kmm.params import format_list, parse_list, parse_size
from tests.conftest import recording


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"memory": "1X"}, "machine.memory: '1X' is not a size; allowed.* K, M, G or T"),
        ({"nodes": [{"memry": "1G"}]}, r"machine.nodes\[0\].memry: '1G'; allowed: an object with"),
        ({"memory": 5}, "machine.memory: 5; allowed: 64M to 65534G"),
        ({"memory": "1G", "maxmem": "512M"}, "machine.maxmem: 536870912; allowed"),
        ({"cpus": 0}, "machine.cpus: 0; allowed: a number from 1 to 8192"),
        ({"slots": 257}, "machine.slots: 257; allowed: a number from 0 to 256"),
        ({"colour": "red"}, "machine.colour: 'red'; no such field; allowed: block_size"),
        ({"nodes": 3}, "machine.nodes: 3; allowed: a list of 1 to 64 nodes"),
        ({"nodes": [{"ram": 1}]}, r"machine.nodes\[0\].*; allowed: an object"),
        ({"nodes": [{"cpus": "x", "memory": "1G"}]}, r"machine.nodes\[0\].cpus: 'x' is not a list"),
        ({"nodes": [{"cpus": "0-3", "memory": "1G"}]}, "CPU 1; allowed: each of 0 to 0 once"),
        ({"nodes": [{"memory": "512M"}]}, "adds up to 536870912; allowed: machine.memory"),
        ({"distances": [[10, 5]]}, "machine.distances: .*; allowed: 1 rows of 1"),
        ({"block_size": "100M"}, "machine.block_size: 104857600; allowed: a power of two"),
        ({"seed": -1}, "machine.seed: -1; allowed"),
        ({"cmdline": 7}, "machine.cmdline: 7; allowed: text"),
        ({"memory": (1 << 30) + 1}, "machine.memory: 1073741825; .* multiples of 2 MiB"),
        ({"memory": "9" * 5000}, "machine.memory: '9999.*is not a size"),
        ({"memory": 10**5000}, "machine.memory: a int too large to show; allowed"),
        ({"nodes": [{"cpus": 10**5000, "memory": "1G"}]}, r"nodes\[0\].cpus: a int too large"),
        ({"nodes": [{"cpus": "9" * 5000, "memory": "1G"}]}, r"nodes\[0\].cpus: .* not a list"),
        ({"struct_page_size": 60}, "machine.struct_page_size: 60; allowed: 56, 64"),
        ({"struct_page_size": 64.0}, "machine.struct_page_size: 64.0; allowed: 56, 64"),
        ({"hypervisor": "no"}, "machine.hypervisor: 'no'; allowed: true or false"),
        ({5: 1, "x": 2}, "machine.5: 1; no such field"),
        ({"machine": 3}, "machine.machine: 3; allowed: text"),
        ({"distances": "x"}, "machine.distances: 'x'; allowed: 1 rows"),
        ({"distances": 0}, "machine.distances: 0; allowed: 1 rows"),
        ({"nodes": [{"cpus": [0, "1"], "memory": "1G"}]}, r"nodes\[0\].cpus: \[0, '1'\]; allowed"),
        ({"nodes": [{"cpus": [-1], "memory": "1G"}]}, r"nodes\[0\].cpus: \[-1\]; allowed"),
        ({"srat": "no"}, "machine.srat: 'no'; allowed: 'qemu', 'full'"),
        ({"probe_add": 1}, "machine.probe_add: 1; allowed: true or false"),
        (7, "machine: 7; allowed: an object"),
    ],
)
def test_mistakes_are_named(data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MachineConfig.from_dict(data)


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("", ()),
        ("  a\tb ", (("a", None), ("b", None))),
        ("a= b==c", (("a", ""), ("b", "=c"))),
        ('a="b c" d', (("a", "b c"), ("d", None))),
        ('"a=b c" d', (("a", "b c"), ("d", None))),
        ('"a b"', (("a b", None),)),
        ('a=b"c d"e f', (("a", 'b"c d"e'), ("f", None))),
        ('a="b', (("a", "b"),)),
        ('"a="b c"', (("a", "b"), ('c"', None))),
        ("=a=b", (("=a", "b"),)),
        ("a-b=c-d", (("a_b", "c-d"),)),
        ("a\\ b'c d'", (("a\\", None), ("b'c", None), ("d'", None))),
    ],
)
def test_the_command_line_is_split_as_the_kernel_does(
    text: str, pairs: tuple[tuple[str, str | None], ...]
) -> None:
    assert parse_cmdline(text) == pairs


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
        ("memory_hotplug.memmap_on_memory=", "memmap_on_memory", False),
        ('foo="a b" movable_node', "movable_node_enabled", True),
        ('foo="a movable_node', "movable_node_enabled", False),
        ("foo='bar movable_node", "movable_node_enabled", True),
        ("foo='bar movable_node'", "movable_node_enabled", False),
        ("foo=bar\\ movable_node", "movable_node_enabled", True),
        ("-- movable_node", "movable_node_enabled", False),
        ("quiet -- movable_node", "movable_node_enabled", False),
        ("--=1 movable_node", "movable_node_enabled", True),
        ('memory_hotplug.online_policy="auto-movable"', "online_policy", "auto-movable"),
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


def test_on_bare_metal_blocks_are_as_large_as_can_be() -> None:
    config = {"memory": "65G", "maxmem": "1T"}
    assert Machine(MachineConfig.from_dict(config)).block_size == 1 << 30
    m = Machine(MachineConfig.from_dict({**config, "hypervisor": False}))
    assert m.block_size == 2 << 30
    m.validate()


def test_a_node_of_a_few_pages_keeps_none_of_them() -> None:
    nodes = [{"cpus": "0", "memory": "126M"}, {"memory": "2M"}]
    m = Machine(MachineConfig.from_dict({"memory": "128M", "nodes": nodes}))
    small = m.nodes[1].zone(1)
    assert 0 < small.managed_pages <= small.present_pages < 1024
    m.validate()


MB = 1 << 20
SIZES = st.one_of(
    st.integers(0, 1 << 14).map(lambda n: 2 * MB * n),
    st.integers(-1, 1 << 47),
    st.sampled_from(["64M", "3G", "2T", "1X", "", "0x8000000", 65534 << 30, 1 << 46]),
)
ODD = st.sampled_from([None, True, -1, 1.5, "", "x", [], {}, 10**30, "9" * 5000])


@st.composite
def node_lists(draw: st.DrawFn) -> tuple[list[dict[str, object]], int]:
    """Nodes with memory and CPUs that mostly fit the machine, and their memory."""
    sizes = draw(st.lists(st.integers(0, 700).map(lambda n: 2 * MB * n), min_size=1, max_size=5))
    nodes: list[dict[str, object]] = [{"memory": s} if s else {} for s in sizes]
    for cpu in range(draw(st.integers(0, 3))):
        nodes[draw(st.integers(0, len(nodes) - 1))].setdefault("cpus", str(cpu))
    return nodes, sum(sizes)


@st.composite
def descriptions(draw: st.DrawFn) -> dict[str, object]:
    data: dict[str, object] = {}
    if draw(st.booleans()):
        data["nodes"], data["memory"] = draw(node_lists())
        nr = len(data["nodes"])  # type: ignore[arg-type]
        data["maxmem"] = "64G"
        if draw(st.booleans()):
            data["distances"] = [[10 if a == b else 20 + a for a in range(nr)] for b in range(nr)]
    else:
        data["memory"] = draw(SIZES)
        data["maxmem"] = draw(st.one_of(st.just("64T"), SIZES))
    data["cpus"] = draw(st.integers(1, 6))
    data["slots"] = draw(st.integers(0, 20))
    data["srat"] = draw(st.sampled_from(["qemu", "full"]))
    data["hypervisor"] = draw(st.booleans())
    data["struct_page_size"] = draw(st.sampled_from([56, 64]))
    data["cmdline"] = draw(st.sampled_from(["", "movable_node", "a='b", 'x="', "--"]))
    data["block_size"] = draw(st.sampled_from([None, 1 << 27, 1 << 31, 1 << 36]))
    if draw(st.integers(0, 3)) == 0:
        data[draw(st.sampled_from([*data, "seed", "probe", "colour"]))] = draw(ODD)
    return data


@settings(max_examples=120, deadline=None, derandomize=True)
@given(descriptions())
def test_a_description_is_refused_by_name_or_boots(data: dict[str, object]) -> None:
    try:
        config = MachineConfig.from_dict(data)
    except ConfigError as e:
        assert re.match(r"machine[.\w\[\]]*: .*(allowed|not a)", str(e)), str(e)
        assert len(str(e)) < 400
        return
    if config.memory <= 16 << 30:
        Machine(config).validate()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory": "1G"}, "machine.memory: '1G'; allowed: a number of bytes"),
        ({"memory": -1}, "machine.memory: -1 is not a size"),
        ({"memory": 2 << 30}, "machine.nodes: their memory adds up to 1073741824"),
        ({"maxmem": 5}, "machine.maxmem: 5; allowed: from machine.memory"),
        ({"cpus": 0}, "machine.cpus: 0; allowed: a number from 1"),
        ({"slots": -1}, "machine.slots: -1; allowed: a number from 0"),
        ({"nodes": ()}, r"machine.nodes: \[\]; allowed: a list of 1 to 64"),
        ({"nodes": 5}, "machine.nodes: 5; allowed: a tuple of NodeConfig"),
        ({"nodes": ({"memory": 1 << 30},)}, "machine.nodes: .*; allowed: a tuple of NodeConfig"),
        ({"nodes": (NodeConfig((0,), "1G"),)}, "machine.nodes: .*; allowed: a tuple of NodeConf"),
        ({"block_size": 3}, "machine.block_size: 3; allowed: a power of two"),
        ({"cmdline": 5}, "machine.cmdline: 5; allowed: text"),
        ({"seed": "x"}, "machine.seed: 'x'; allowed: a number"),
        ({"distances": ((1,),)}, r"machine.distances: \(\(1,\),\); allowed"),
        ({"srat": 5}, "machine.srat: 5; allowed"),
        ({"memory_failure": 1}, "machine.memory_failure: 1; allowed: true or false"),
        ({"zones": (9,)}, r"machine.zones: \(9,\); allowed"),
        ({"struct_page_size": "x"}, "machine.struct_page_size: 'x'; allowed"),
    ],
)
def test_a_config_built_by_hand_is_checked_like_a_description(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Machine(MachineConfig(**fields))
    files = recording("movable_node")["steps"][0]["files"]
    with pytest.raises(ConfigError, match=message):
        Machine.from_files(files, MachineConfig(**fields))


def test_a_config_that_was_changed_says_what_it_does() -> None:
    """The command line is split anew, and a CPU that no node names belongs to the first."""
    config = MachineConfig.from_dict({"cmdline": "movable_node"})
    m = Machine(replace(config, cmdline="memhp_default_state=online_movable", cpus=2))
    assert (m.movable_node_enabled, m.mhp_default_online_type) == (False, 3)
    assert m.cpus_of_node(0) == (0, 1)
    m.validate()


def test_numpy_numbers_describe_a_machine() -> None:
    data = {
        "memory": np.uint64(1 << 30),
        "maxmem": np.int64(4 << 30),
        "cpus": np.int32(2),
        "nodes": [{"cpus": np.arange(2).tolist(), "memory": np.uint64(1 << 30)}, {}],
        "distances": np.array([[10, 20], [20, 10]]).tolist(),
        "struct_page_size": np.uint8(64),
    }
    config = MachineConfig.from_dict(data)
    assert config == MachineConfig.from_dict(
        {
            "memory": "1G",
            "maxmem": "4G",
            "cpus": 2,
            "nodes": [{"cpus": "0-1", "memory": "1G"}, {}],
            "distances": [[10, 20], [20, 10]],
        }
    )
    assert type(config.memory) is int and type(config.cpus) is int
    Machine(config).validate()
