"""Notifications, ejection and containers: who is asked, what is left, what firmware hears."""

from __future__ import annotations

import errno

import pytest

from kmm import FirmwareRefused, KernelError, Machine
from kmm import memory_hotplug as mh
from kmm.errors import ImpossibleState
from kmm.snapshot import differences, dump
from tests.conftest import DIMM

BLOCK = 128 << 20
MEMORY = "/sys/devices/system/memory"


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


def test_a_device_that_is_not_there_is_not_missed(m: Machine) -> None:
    """It is checked before it has come, comes, is checked again, goes, and is asked for once more.

    Expect EALREADY twice, and its memory while it is there.
    """
    assert m.plug("a", 1, DIMM, BLOCK, sta=0) == 1
    assert m.log[-1] == "acpi PNP0C80:00: Still not present"
    m.dimms["a"].sta = 0xF
    assert m.notify("a", "device_check") == 0
    assert 32 in m.memory_blocks
    before = dump(m)
    assert m.notify("a", "device_check") == 0
    assert m.notify("a", "bus_check") == 0
    assert differences(before, dump(m)) == []
    m.validate()
    m.dimms["a"].sta = 0
    assert m.notify("a", "device_check") == 0
    assert 32 not in m.memory_blocks
    assert m.notify("a", "device_check") == 1
    assert m.log.count("acpi PNP0C80:00: Still not present") == 2
    assert m.notify("a", "bus_check") == 0
    m.validate()


def test_a_device_that_nobody_handled_is_known_all_the_same(m: Machine) -> None:
    """Present but not enabled: no driver takes it, and a later check finds it enumerated."""
    assert m.plug("a", 1, DIMM, BLOCK, sta=0x9) == 0
    m.dimms["a"].sta = 0xF
    assert m.notify("a", "device_check") == 0
    assert 32 not in m.memory_blocks
    m.dimms["a"].sta = 0
    assert m.notify("a", "bus_check") == 0
    m.dimms["a"].sta = 0xF
    assert m.notify("a", "bus_check") == 0
    assert 32 in m.memory_blocks
    m.validate()


def test_a_check_retries_what_could_not_be_added(m: Machine) -> None:
    m.trace(recording=False).fail("__add_memory", errno.ENOMEM)
    assert m.plug("a", 1, DIMM, BLOCK) == 0
    assert 32 not in m.memory_blocks
    assert m.notify("a", "device_check") == 0
    assert 32 in m.memory_blocks
    m.validate()


def test_memory_that_goes_without_notice_while_it_is_online_stops_the_kernel(m: Machine) -> None:
    m.plug("a", 1, DIMM, BLOCK)
    m.write(f"{MEMORY}/memory32/state", "online_movable")
    m.dimms["a"].sta = 0
    before, lines = dump(m), len(m.log)
    with pytest.raises(ImpossibleState, match="__remove_memory"):
        m.notify("a", "device_check")
    assert differences(before, dump(m)) == []
    assert [line.split(",")[0] for line in m.log[lines:]] == ["removing memory fails"]
    m.validate()
    # Nothing of it was removed: with its memory offline, the device can go.
    m.write(f"{MEMORY}/memory32/state", "offline")
    assert m.notify("a", "device_check") == 0
    assert 32 not in m.memory_blocks
    m.validate()


@pytest.mark.parametrize(
    ("ej0", "sta", "status", "line"),
    [
        ("missing", 0xF, 1, None),
        ("fails", 0xF, 1, None),
        ("stays", 0xF, 0, "ACPI: \\_SB_.MHPC.MP00: Eject incomplete - status 0xf"),
        ("stays", 0x0, 0, None),
    ],
)
def test_firmware_that_does_not_eject(
    m: Machine, ej0: str, sta: int, status: int, line: str | None
) -> None:
    """The memory is gone in every case; the DIMM stays in its slot, and a check adds it again."""
    m.plug("a", 1, DIMM, 2 * BLOCK)
    m.dimms["a"].ej0 = ej0
    before = len(m.log)
    m.dimms["a"].sta = sta
    assert m.unplug("a") == status
    assert m.log[before:] == ([line] if line else [])
    assert 32 not in m.memory_blocks and "a" in m.dimms
    assert m.ost_events[-1] == ("a", 3, status)
    m.validate()
    m.dimms["a"].sta, m.dimms["a"].ej0 = 0xF, "ejects"
    assert m.notify("a", "device_check") == 0
    assert {32, 33} <= set(m.memory_blocks)
    assert m.unplug("a") == 0 and m.dimms == {}
    m.validate()


def test_an_eject_file_of_a_device_without_the_method(m: Machine) -> None:
    m.plug("a", 1, DIMM, BLOCK)
    m.dimms["a"].ej0 = "missing"
    with pytest.raises(KernelError) as e:
        m.write("/sys/bus/acpi/devices/PNP0C80:00/eject", "1")
    assert e.value.errno == errno.ENODEV
    m.validate()


def test_notifications_that_are_none(m: Machine) -> None:
    m.plug("a", 1, DIMM, BLOCK)
    with pytest.raises(KernelError, match="event: 'wake'; allowed: bus_check, device_check, eject"):
        m.notify("a", "wake")
    with pytest.raises(FirmwareRefused, match="'b' not found"):
        m.notify("b", "bus_check")
    m.validate()


def test_a_container_with_removed_memory_can_be_taken_offline(m: Machine) -> None:
    name, _ = m.plug_container([("a", 1, DIMM, BLOCK), ("b", 1, DIMM + BLOCK, BLOCK)])
    mh.remove_memory(m, DIMM, BLOCK)
    m.write(f"/sys/devices/system/container/{name}/online", "0")
    assert m.unplug_container(name) == 0
    m.validate()


def test_a_containers_children_go_last_first_and_no_profile_is_asked(m: Machine) -> None:
    """The profile for memory says whether a memory device is ejected, not a container of some."""
    name, _ = m.plug_container([("a", 1, DIMM, BLOCK), ("b", 1, DIMM + BLOCK, BLOCK)])
    path = f"/devices/system/container/{name} container"
    assert m.uevents[0] == f"add {path}" and m.uevents[-1] == f"online {path}"
    m.write("/sys/firmware/acpi/hotplug/memory/enabled", "0")
    m.write(f"/sys{path.split()[0]}/online", "0")
    m.uevents.clear()
    assert m.unplug_container(name) == 0
    assert m.uevents[:2] == [
        "remove /devices/system/memory/memory33 memory",
        "remove /devices/system/memory/memory32 memory",
    ]
    assert m.uevents[-1] == f"remove {path}"
    m.validate()


def test_a_block_that_is_online_again_in_an_offline_container_stops_the_kernel(m: Machine) -> None:
    """Nothing keeps user space from it, and nothing looks again before the memory is removed."""
    name, _ = m.plug_container([("a", 1, DIMM, BLOCK), ("b", 1, DIMM + BLOCK, BLOCK)])
    m.write(f"/sys/devices/system/container/{name}/online", "0")
    m.write(f"{MEMORY}/memory32/state", "online_movable")
    before = dump(m)
    with pytest.raises(ImpossibleState, match="__remove_memory"):
        m.unplug_container(name)
    # The other module, which the kernel would have removed first, is still there.
    assert differences(before, dump(m)) == []
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


@pytest.mark.parametrize("function", ["offline_pages", "start_isolate_page_range", "memory_notify"])
def test_an_ejection_that_fails_once_succeeds_in_the_second_pass(m: Machine, function: str) -> None:
    m.plug("a", 1, DIMM, 2 * BLOCK)
    m.write(f"{MEMORY}/memory32/state", "online_movable")
    m.trace(recording=False).fail(function, errno.EBUSY)
    assert m.unplug("a") == 0
    m.validate()
