"""The ACPI door: attach, notify, eject, and what firmware hears."""

from __future__ import annotations

import errno

import pytest

from kmm import FirmwareRefused, KernelError, Machine
from kmm.acpi_memhotplug import AcpiMemoryInfo, acpi_memory_get_device_resources
from kmm.firmware import Dimm
from kmm.snapshot import differences, dump
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


def test_an_ejection_that_fails_brings_blocks_back_in_the_default_zone(m: Machine) -> None:
    """memory33 was Movable; the failed ejection re-onlines it by default, which is Normal."""
    m.plug("a", 1, DIMM, 2 * BLOCK)
    m.write(f"{MEMORY}/memory32/state", "online_kernel")
    m.write(f"{MEMORY}/memory33/state", "online_movable")
    pfn = m.alloc_pages(nid=1)
    m.uevents.clear()
    assert m.unplug("a") == 0x82
    assert m.log[-1] == "memory memory32: Offline failed."
    assert m.read(f"{MEMORY}/memory33/valid_zones") == "Normal\n"
    assert m.uevents == [
        f"{a} /devices/system/memory/memory33 memory" for a in ("offline", "online")
    ]
    m.validate()
    m.free_pages(pfn)
    assert m.unplug("a") == 0
    m.validate()


def test_blocks_that_were_offline_stay_offline_after_a_failed_ejection(m: Machine) -> None:
    m.plug("a", 1, DIMM, 2 * BLOCK)
    m.write(f"{MEMORY}/memory32/state", "online_kernel")
    pfn = m.alloc_pages(nid=1)
    assert m.unplug("a") == 0x82
    assert m.read(f"{MEMORY}/memory33/state") == "offline\n"
    m.free_pages(pfn)
    m.validate()


def test_a_disabled_profile_refuses_ejection(m: Machine) -> None:
    m.plug("a", 1, DIMM, BLOCK)
    m.write("/sys/firmware/acpi/hotplug/memory/enabled", "0")
    assert m.unplug("a") == 0x80
    assert m.log[-1] == "acpi PNP0C80:00: Eject disabled"
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
    assert m.plug("a", 1, DIMM, BLOCK, sta=sta) == 0
    assert (32 in m.memory_blocks) == (sta == 0xB)
    m.validate()


def test_a_container_must_be_taken_offline_by_user_space(m: Machine) -> None:
    name, status = m.plug_container([("a", 1, DIMM, BLOCK), ("b", 1, DIMM + BLOCK, BLOCK)])
    assert (name, status) == ("ACPI0004:00", 0)
    online = f"/sys/devices/system/container/{name}/online"
    m.write(f"{MEMORY}/memory33/state", "online_movable")
    assert m.unplug_container(name) == 0x82
    assert m.uevents[-1] == f"change /devices/system/container/{name} container"
    with pytest.raises(KernelError) as e:
        m.write(online, "0")
    assert e.value.errno == errno.EBUSY
    m.write(f"{MEMORY}/memory33/state", "offline")
    m.write(online, "0")
    assert m.read(online) == "0\n"
    assert m.unplug_container(name) == 0
    assert m.dimms == {}
    with pytest.raises(FirmwareRefused):
        m.unplug_container(name)
    m.validate()


def test_a_refused_container_leaves_no_dimm(m: Machine) -> None:
    with pytest.raises(FirmwareRefused, match="conflicts"):
        m.plug_container([("a", 1, DIMM, BLOCK), ("b", 1, DIMM, BLOCK)])
    assert m.dimms == {}
    assert m.plug("a", 1, DIMM, BLOCK) == 0
    m.validate()


def test_eject_file(m: Machine) -> None:
    m.plug("a", 1, DIMM, BLOCK)
    eject = "/sys/bus/acpi/devices/PNP0C80:00/eject"
    with pytest.raises(KernelError) as e:
        m.write(eject, "2")
    assert e.value.errno == errno.EINVAL
    with pytest.raises(KernelError) as e:
        m.write(eject.replace(":00", ":05"), "1")
    assert e.value.errno == errno.ENODEV
    m.write(eject, "1")
    assert m.ost_events[-1][1:] == (0x103, 0)
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


@pytest.mark.parametrize("function", ["offline_pages", "start_isolate_page_range", "memory_notify"])
def test_an_ejection_that_fails_once_succeeds_in_the_second_pass(m: Machine, function: str) -> None:
    m.plug("a", 1, DIMM, 2 * BLOCK)
    m.write(f"{MEMORY}/memory32/state", "online_movable")
    m.trace(recording=False).fail(function, errno.EBUSY)
    assert m.unplug("a") == 0
    m.validate()
