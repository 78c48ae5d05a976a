"""What the platform refuses, in its words, and the nodes that its tables announce."""

from __future__ import annotations

import pytest

from kmm import FirmwareRefused, Machine, MachineConfig
from kmm.errors import InvalidArgument
from kmm.firmware import device_memory, pxm_to_node_map
from kmm.replay import boot_machine
from tests.conftest import DIMM, recording, two_nodes

G, B = 1 << 30, 128 << 20


def test_a_dimm_has_a_name(m: Machine) -> None:
    with pytest.raises(FirmwareRefused, match="Parameter 'id' expects an identifier"):
        m.plug("", 1, DIMM, B)
    with pytest.raises(FirmwareRefused, match="Parameter 'id' expects an identifier"):
        m.plug_container([("a", 1, DIMM, B), ("", 1, DIMM + B, B)])
    assert m.dimms == {} and m.acpi_containers == {} and m.uevents == []
    m.validate()


@pytest.mark.parametrize(
    ("node", "addr", "size", "words"),
    [
        (1, DIMM + (1 << 20), B, "address must be aligned to 0x200000 bytes"),
        (2, DIMM, B, "'DIMM property node has value 2' which exceeds the number of numa nodes: 2"),
        (1, 3 * G, B, r"can't add memory device \[0xc0000000:0x8000000\], usable range"),
        (1, DIMM, B + (1 << 20), "backend memory size must be multiple of 0x200000"),
        (1, DIMM, 20 * G, "not enough space, currently 0x0 in use of total space"),
    ],
)
def test_refusals(m: Machine, node: int, addr: int, size: int, words: str) -> None:
    with pytest.raises(FirmwareRefused, match=words):
        m.plug("a", node, addr, size)
    assert m.dimms == {} and m.uevents == []
    assert m.plug("a", 1, DIMM, B) == 0
    with pytest.raises(FirmwareRefused, match="Duplicate device ID 'a'"):
        m.plug("a", 1, DIMM + B, B)
    assert m.unplug("a") == 0
    assert m.plug("a", 1, DIMM, B) == 0
    m.validate()


def test_a_recordings_monitor_never_forgets_an_id() -> None:
    m = boot_machine(recording("unaligned"))
    with pytest.raises(FirmwareRefused, match="address must be aligned"):
        m.plug("x", 1, DIMM + (1 << 20), B)
    with pytest.raises(FirmwareRefused, match="attempt to add duplicate property 'be-x'"):
        m.plug("x", 1, DIMM, B)
    m.validate()


@pytest.mark.parametrize(
    ("crs", "words"),
    [
        (((-1, 5), (0, 4)), r"crs\[0\] start: -1; allowed: a number from 0"),
        (((DIMM, B), ("x", 4)), r"crs\[1\] start: 'x'; allowed: a number"),
        (((DIMM, None),), r"crs\[0\] length: None; allowed: a number"),
        (((DIMM, B, 1),), r"crs\[0\]: .*; allowed: \(start, length\)"),
        ("x", r"crs: 'x'; allowed: a list of \(start, length\)"),
    ],
)
def test_a_crs_that_is_none(m: Machine, crs, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        m.plug("a", 1, DIMM, B, crs=crs)
    assert m.dimms == {}
    m.validate()


def test_methods_that_are_none(m: Machine) -> None:
    with pytest.raises(InvalidArgument, match="sta: 'x'; allowed: a number"):
        m.plug("a", 1, DIMM, B, sta="x")  # type: ignore[arg-type]
    assert m.dimms == {}
    m.plug("a", 1, DIMM, B)
    m.dimms["a"].ej0 = "explodes"
    with pytest.raises(InvalidArgument, match="ej0: 'explodes'; allowed: ejects, missing, fails"):
        m.unplug("a")
    m.validate()


def test_overlap_and_slots() -> None:
    m = two_nodes(slots=1)
    m.plug("a", 1, DIMM, B)
    with pytest.raises(FirmwareRefused, match="slot"):
        m.plug("b", 1, DIMM + B, B)
    m.validate()
    m = two_nodes()
    m.plug("a", 1, DIMM, B)
    with pytest.raises(FirmwareRefused, match="conflicts with memory device id='a'"):
        m.plug("b", 1, DIMM, B)
    m.validate()


def four(**more: object) -> MachineConfig:
    nodes = [{"cpus": "0", "memory": "1G"}, {"cpus": "1", "memory": "1G"}, {}, {}]
    return MachineConfig.from_dict({"memory": "2G", "cpus": 2, "nodes": nodes, **more})


def test_only_the_last_domain_without_memory_has_a_node_under_qemu() -> None:
    assert pxm_to_node_map(four()) == {0: 0, 1: 1, 3: 2}
    assert pxm_to_node_map(four(srat="full")) == {0: 0, 1: 1, 3: 2, 2: 3}
    m = Machine(four())
    m.plug("a", 2, DIMM, B)
    assert m.memory_blocks[32].nid == 0
    m.plug("b", 3, DIMM + B, B)
    assert m.memory_blocks[33].nid == 2
    m.validate()


def test_the_range_for_dimms() -> None:
    assert device_memory(two_nodes().config) == (DIMM, 31 * G)
