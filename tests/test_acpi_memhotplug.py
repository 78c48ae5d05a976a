"""Memory devices: what is added, how blocks are linked with them, what firmware hears."""

from __future__ import annotations

import errno

import pytest

from kmm import Machine
from kmm import memory_hotplug as mh
from kmm.acpi_memhotplug import AcpiMemoryInfo, acpi_memory_get_device_resources
from kmm.firmware import Dimm
from kmm.snapshot import differences, dump
from kmm.sysfs import lookup
from tests.conftest import DIMM, two_nodes

BLOCK = 128 << 20
MEMORY = "/sys/devices/system/memory"


def test_plug_and_unplug_answer_firmware(m: Machine) -> None:
    assert m.plug("a", 1, DIMM, 2 * BLOCK) == 0
    assert m.unplug("a") == 0
    assert m.ost_events == [("a", 1, 0), ("a", 3, 0x84), ("", 3, 0)]
    assert m.dimms == {}
    m.validate()


def test_a_dimm_that_cannot_be_added_still_answers_success(m: Machine) -> None:
    before = dump(m)
    assert m.plug("odd", 1, DIMM, BLOCK + (2 << 20)) == 0
    assert m.log == [
        "x86/mm: Memory block size: 128MB",
        *m.log[1:-3],
        "Block size [0x8000000] unaligned hotplug range: start 0x100000000, size 0x8200000",
        "acpi PNP0C80:00: add_memory failed",
        "acpi PNP0C80:00: acpi_memory_enable_device() error",
    ]
    assert [d for d in differences(before, dump(m)) if not d.startswith("/dimms")] == []
    assert m.unplug("odd") == 0
    m.validate()


def test_ranges_that_follow_each_other_are_one() -> None:
    crs = ((0x1000, 0x1000), (0x2000, 0x1000), (0x5000, 0x1000), (0x4000, 0x1000))
    infos = acpi_memory_get_device_resources(Dimm("a", 0, 0, 0, 0, crs))
    assert [(i.start_addr, i.length) for i in infos] == [
        (0x1000, 0x2000),
        (0x5000, 0x1000),
        (0x4000, 0x1000),
    ]
    assert not AcpiMemoryInfo(0, 0).enabled


def test_one_good_range_is_enough(m: Machine) -> None:
    crs = ((DIMM, BLOCK), (DIMM + BLOCK + 4096, BLOCK))
    assert m.plug("a", 1, DIMM, 4 * BLOCK, crs=crs) == 0
    assert m.read(f"{MEMORY}/memory32/state") == "offline\n"
    assert 33 not in m.memory_blocks
    assert m.unplug("a") == 0
    m.validate()


@pytest.mark.parametrize("sta", [0, 0x1, 0x3, 0xB])
def test_only_a_usable_device_is_added(m: Machine, sta: int) -> None:
    assert m.plug("a", 1, DIMM, BLOCK, sta=sta) == (0 if sta else 1)
    assert (32 in m.memory_blocks) == (sta == 0xB)
    m.validate()


def links(m: Machine, device: str = "PNP0C80:00") -> list[str]:
    names = m.listdir(f"/sys/bus/acpi/devices/{device}")
    return [n for n in names if n.startswith("physical_node")]


def test_a_link_goes_with_its_block(m: Machine) -> None:
    """Two of three blocks are removed by a caller; the ejection of the DIMM finds the third."""
    m.plug("a", 1, DIMM, 3 * BLOCK)
    mh.remove_memory(m, DIMM, 2 * BLOCK)
    assert links(m) == ["physical_node2"]
    assert "memory34" in str(lookup(m, "/sys/bus/acpi/devices/PNP0C80:00/physical_node2").link)
    m.validate()
    assert m.unplug("a") == 0
    assert m.memory_blocks.keys() == set(range(8)) and m.memory_groups == {}
    m.validate()


def test_a_dimm_whose_memory_was_removed_already_can_be_ejected(m: Machine) -> None:
    m.plug("a", 1, DIMM, 2 * BLOCK)
    mh.remove_memory(m, DIMM, 2 * BLOCK)
    assert links(m) == []
    m.validate()
    assert m.unplug("a") == 0
    assert m.log[-2:] == [
        "section already deactivated (0x100000 + 32768)",
        "section already deactivated (0x108000 + 32768)",
    ]
    m.validate()
    assert m.plug("a", 1, DIMM, 2 * BLOCK) == 0
    assert 33 in m.memory_blocks
    m.validate()


def test_a_block_belongs_to_one_device(m: Machine) -> None:
    """The second DIMM's _CRS lists the first one's memory: it exists, but cannot be linked.

    Expect the links of both to be gone, and no driver for the second.
    """
    m.plug("a", 1, DIMM, BLOCK)
    assert m.plug("b", 1, DIMM + BLOCK, BLOCK, crs=((DIMM, BLOCK),)) == 0
    assert m.log[-2:] == [
        "memory memory32: ACPI companion already set",
        "acpi PNP0C80:01: acpi_memory_enable_device() error",
    ]
    assert (links(m), links(m, "PNP0C80:01")) == ([], [])
    assert not m.acpi_devices[1].attached
    m.validate()
    assert (m.unplug("b"), m.unplug("a")) == (0, 0)
    assert 32 not in m.memory_blocks
    m.validate()


def test_without_the_handler_devices_are_left_alone() -> None:
    m = two_nodes("acpi_no_memhotplug")
    assert m.plug("a", 1, DIMM, BLOCK) == 0
    assert 32 not in m.memory_blocks
    assert m.unplug("a") == 0
    m.validate()


@pytest.mark.parametrize(
    ("function", "nth"),
    [
        ("memory_group_register_static", 1),
        ("__add_memory", 1),
        ("sparse_add_section", 2),
        ("add_memory_block", 2),
    ],
)
def test_an_add_that_fails_leaves_the_dimm_alone(m: Machine, function: str, nth: int) -> None:
    before = dump(m)
    m.trace(recording=False).fail(function, errno.ENOMEM, nth)
    assert m.plug("a", 1, DIMM, 2 * BLOCK) == 0
    m.kprobes = None
    assert [d for d in differences(before, dump(m)) if not d.startswith("/dimms")] == []
    m.validate()
    assert m.unplug("a") == 0
    assert m.plug("b", 1, DIMM, 2 * BLOCK) == 0
    assert m.read(f"{MEMORY}/memory33/state") == "offline\n"
    m.validate()
