"""The buses of /sys, and what the memory devices on the ACPI bus tell of themselves."""

from __future__ import annotations

import pytest

from kmm import KernelError, Machine
from kmm.sysfs import follow, stat
from tests.test_programs import four_dimms

BUS, ACPI = "/sys/bus/", "/sys/bus/acpi/devices/"
MEMORY = "/sys/devices/system/memory"


@pytest.fixture
def four() -> Machine:
    return four_dimms()


@pytest.mark.parametrize("bus", ["container", "memory", "node"])
def test_a_bus(four: Machine, bus: str) -> None:
    names = ["devices", "drivers", "drivers_autoprobe", "drivers_probe", "uevent"]
    assert four.listdir(BUS + bus) == names
    assert four.listdir(f"{BUS}{bus}/drivers") == []
    assert [stat(four, f"{BUS}{bus}/{n}").mode for n in names[2:]] == [0o644, 0o200, 0o200]


def test_probing_a_device_by_its_name(four: Machine) -> None:
    four.write(BUS + "memory/drivers_probe", "memory0")
    four.write(ACPI + "../drivers_probe", "PNP0C80:00")
    for name in ("memory99", "", "memory0 "):
        with pytest.raises(KernelError, match="ENODEV"):
            four.write(BUS + "memory/drivers_probe", name)
    path = BUS + "memory/drivers_autoprobe"
    for value, shown in (("0", "0\n"), ("abc", "1\n")):
        four.write(path, value)
        assert four.read(path) == shown
    four.validate()


def test_a_buss_uevent(four: Machine) -> None:
    four.write(BUS + "memory/uevent", "change")
    assert "change /bus/memory bus" in four.uevents[-1]
    with pytest.raises(KernelError, match="EINVAL"):
        four.write(BUS + "memory/uevent", "abc")
    assert four.log[-1] == "synth uevent: /bus/memory: unknown uevent action string"
    four.validate()


def test_what_a_dimm_tells(four: Machine) -> None:
    here, empty = ACPI + "PNP0C80:00/", ACPI + "PNP0C80:0a/"
    shown = {"hid": "PNP0C80\n", "path": "\\_SB_.MHPC.MP00\n", "uid": "0x00\n", "status": "15\n"}
    shown |= {"modalias": "acpi:PNP0C80:\n", "uevent": "MODALIAS=acpi:PNP0C80:\n"}
    assert {name: four.read(here + name) for name in shown} == shown
    # Where no DIMM is, the kernel knows of none by its id.
    shown |= {"path": "\\_SB_.MHPC.MP0A\n", "uid": "0x0A\n", "status": "0\n"}
    shown |= {"modalias": "", "uevent": "MODALIAS=\n"}
    assert {name: four.read(empty + name) for name in shown} == shown
    assert four.listdir(here + "subsystem/devices") == four.listdir(ACPI)
    assert four.read(here + "power/runtime_status") == "unsupported\n"
    parent = ACPI + "PNP0A06:04/"
    assert [four.read(parent + n) for n in ("uid", "path")] == ["DIMM devices\n", "\\_SB_.MHPC\n"]


def test_a_container_is_on_its_bus(four: Machine) -> None:
    four.plug_container([("c", 1, 0x200000000, 128 << 20)])
    (name,) = four.listdir(BUS + "container/devices")
    assert four.read(f"{BUS}container/devices/{name}/subsystem/devices/{name}/online") == "1\n"
    assert four.read(f"{ACPI}{name}/modalias") == f"acpi:{name[:-3]}:\n"
    four.validate()


def test_modes_and_sizes_are_a_real_kernels(four: Machine) -> None:
    for path in ("/proc", "/proc/sys", "/proc/sys/vm", "/sys"):
        assert stat(four, path).mode == 0o555, path
    assert stat(four, MEMORY).mode == 0o755
    assert stat(four, "/sys/devices/system/node/node0/cpulist").size == 28672
    assert stat(four, "/sys/devices/system/node/node0/cpumap").size == 4096
    assert stat(four, "/proc/sys/vm/mmap_rnd_bits").mode == 0o600
    assert four.listdir("/sys/devices/system/node/node1/x86") == []


def test_power_of_a_block(four: Machine) -> None:
    power = f"{MEMORY}/memory32/power/"
    four.write(power + "async", "enabled")
    assert four.read(power + "async") == "enabled\n"
    with pytest.raises(KernelError, match="EINVAL"):
        four.write(power + "async", "1")
    path = power + "autosuspend_delay_ms"
    assert follow(four, path).mode == 0o644
    with pytest.raises(KernelError, match="EIO"):
        four.read(path)
    with pytest.raises(KernelError, match="EIO"):
        four.write(path, "5")
    four.validate()
