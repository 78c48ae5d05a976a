"""Paths are taken literally, links are followed, and no path does worse than an errno."""

from __future__ import annotations

import contextlib
import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmm import KernelError, Machine, MachineConfig
from kmm.sysfs import entries, readlink, stat
from tests.conftest import DIMM, two_nodes
from tests.test_sysfs import walk

MEMORY, NODE = "/sys/devices/system/memory", "/sys/devices/system/node"
ACPI = "/sys/bus/acpi/devices"
BLOCK = 128 << 20


@pytest.fixture
def plugged() -> Machine:
    """A DIMM in its own slot, and one inside a container."""
    m = two_nodes()
    m.plug("a", 1, DIMM, 2 * BLOCK)
    m.plug_container([("b", 1, DIMM + 2 * BLOCK, BLOCK)])
    return m


def exists(m: Machine, path: str) -> int:
    """The errno of opening a path as a file, then as a directory; 0 if either goes."""
    for call in (m.read, m.listdir):
        try:
            call(path)
        except KernelError as e:
            code = e.errno or 0
        else:
            return 0
    return code


def test_every_link_leads_somewhere(plugged: Machine) -> None:
    links = [p for p in walk(plugged, "/") if stat(plugged, p).kind == "link"]
    assert len(links) > 40
    for path in links:
        assert plugged.listdir(path) == plugged.listdir(path + "/"), path
        real = f"{path.rpartition('/')[0]}/{readlink(plugged, path)}"
        assert plugged.listdir(real) == plugged.listdir(path), path


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (f"{MEMORY}/memory32/firmware_node/hid", "PNP0C80\n"),
        (f"{MEMORY}/memory33/firmware_node/physical_node1/phys_index", "00000021\n"),
        (f"{MEMORY}/memory34/firmware_node/../hid", "ACPI0004\n"),
        (f"{MEMORY}/memory34/firmware_node/../physical_node/online", "1\n"),
        (f"{ACPI}/PNP0C80:00/physical_node/state", "offline\n"),
        (f"{ACPI}/PNP0C80:01/physical_node/phys_index", "00000022\n"),
        (f"{ACPI}/PNP0C80:01/status", "15\n"),
        (f"{ACPI}/PNP0C80:02/status", "0\n"),
        (f"{ACPI}/ACPI0004:00/PNP0C80:01/hid", "PNP0C80\n"),
        ("/sys/devices/system/container/ACPI0004:00/firmware_node/hid", "ACPI0004\n"),
        (f"{MEMORY}/memory32/node1/memory32/node1/distance", "20 10\n"),
        (f"{MEMORY}/memory32/subsystem/devices/memory33/state", "offline\n"),
        (f"{NODE}/node0/cpu1/node0/cpulist", "0-1\n"),
        (f"{NODE}/node0/cpu0/subsystem/devices/cpu1/node0/cpumap", "3\n"),
        ("/sys/devices/system/cpu/online", "0-1\n"),
        ("/sys//devices/./system/memory/../node/online", "0-1\n"),
        ("/../proc/cmdline", "memhp_default_state=offline\n"),
    ],
)
def test_paths_through_links(plugged: Machine, path: str, text: str) -> None:
    assert plugged.read(path) == text


def test_directories_that_programs_list(plugged: Machine) -> None:
    assert plugged.listdir(f"{MEMORY}/memory32/subsystem/devices") == plugged.listdir(
        "/sys/bus/memory/devices"
    )
    assert "memory34" in plugged.listdir(f"{NODE}/node1/")
    assert plugged.listdir("/sys/devices/system/cpu/cpu0") == ["node0", "subsystem", "topology"]
    assert "PNP0C80:00" in plugged.listdir("/sys/devices/LNXSYSTM:00/LNXSYBUS:00/PNP0A06:04")
    assert plugged.listdir(f"{ACPI}/ACPI0004:00") == [
        "PNP0C80:01",
        *"hid modalias physical_node power subsystem uevent".split(),
    ]


def test_link_texts(plugged: Machine) -> None:
    bus = "../../../LNXSYSTM:00/LNXSYBUS:00"
    assert readlink(plugged, f"{MEMORY}/memory32/firmware_node") == f"{bus}/PNP0A06:04/PNP0C80:00"
    assert readlink(plugged, f"{MEMORY}/memory34/firmware_node") == f"{bus}/ACPI0004:00/PNP0C80:01"
    assert readlink(plugged, f"{NODE}/node0/cpu1") == "../../cpu/cpu1"


@pytest.mark.parametrize(
    ("path", "code"),
    [
        (f"{MEMORY}/memory0032/state", errno.ENOENT),
        (f"{MEMORY}/memory032", errno.ENOENT),
        (f"{MEMORY}/memory32 /state", errno.ENOENT),
        (f"{MEMORY}/memory\u0663\u0662/state", errno.ENOENT),
        (f"{NODE}/node1/memory\u00b2", errno.ENOENT),
        (f"{NODE}/node1/memory032", errno.ENOENT),
        (f"{NODE}/node0/cpu\u00b2", errno.ENOENT),
        (f"{NODE}/node0/cpu00", errno.ENOENT),
        (f"{NODE}/node01/distance", errno.ENOENT),
        (f"{MEMORY}/memory32/node01", errno.ENOENT),
        (f"{MEMORY}/memory32/node0", errno.ENOENT),
        (f"{MEMORY}/memory999/power/control", errno.ENOENT),
        (f"{MEMORY}/memory{'9' * 200}/state", errno.ENOENT),
        (f"{MEMORY}/memory{'9' * 250}/state", errno.ENAMETOOLONG),
        ("/proc/." + "/." * 3000, errno.ENAMETOOLONG),
        (f"{ACPI}/PNP0C80:00/physical_node0", errno.ENOENT),
        (f"{ACPI}/PNP0C80:00/physical_node2", errno.ENOENT),
        (f"{ACPI}/PNP0C80:00/physical_node01", errno.ENOENT),
        ("/sys/firmware/memmap/00/start", errno.ENOENT),
        ("/sys/devices/system/cpu/cpu7", errno.ENOENT),
        ("/sys/devices/LNXSYSTM:00/LNXSYBUS:00/PNP0A06:04/PNP0C80:01", errno.ENOENT),
        ("/proc/iomem/", errno.ENOTDIR),
        ("/proc/iomem/x", errno.ENOTDIR),
        (f"{MEMORY}/memory32/state/..", errno.ENOTDIR),
        ("proc/iomem", errno.ENOENT),
        ("", errno.ENOENT),
        ("/proc/iomem\0", errno.ENOENT),
        (f"{NODE}/node1" + "/memory32/node1" * 25, errno.ELOOP),
    ],
)
def test_paths_that_lead_nowhere(plugged: Machine, path: str, code: int) -> None:
    assert exists(plugged, path) == code


def test_a_write_to_a_misspelt_block_changes_nothing(plugged: Machine) -> None:
    for name in ("memory0032", "memory+32", "memory3_2"):
        with pytest.raises(KernelError) as e:
            plugged.write(f"{MEMORY}/{name}/state", "online")
        assert e.value.errno == errno.ENOENT
    assert plugged.memory_blocks[32].state == "offline"


def test_a_number_of_many_digits_is_out_of_range(plugged: Machine) -> None:
    for value in ("9" * 5000, "0x" + "f" * 5000, "0" + "7" * 5000):
        with pytest.raises(KernelError) as e:
            plugged.write(f"{MEMORY}/probe", value)
        assert e.value.errno == errno.ERANGE


NAMES = st.sampled_from(
    """proc sys devices system memory node cpu bus acpi firmware memmap power state online uevent
    memory32 memory0032 memory³ node1 node01 node² cpu0 cpu² subsystem firmware_node physical_node
    iomem vm .. . PNP0C80:00 container LNXSYSTM:00 LNXSYBUS:00 PNP0A06:04 eject probe x""".split()
) | st.text(max_size=8)
WORDS = st.sampled_from(["", "online", "offline", "1", "0", "-1", "²", "add"]) | st.text(max_size=6)


def test_no_path_does_worse_than_an_errno(plugged: Machine) -> None:
    known = walk(plugged, "/")
    paths = st.lists(NAMES, max_size=9).map(lambda names: "/" + "/".join(names)) | st.builds(
        lambda path, names: "/".join([path, *names]), st.sampled_from(known), st.lists(NAMES)
    )

    @settings(max_examples=400, deadline=None)
    @given(path=paths | st.text(), value=WORDS)
    def act(path: str, value: str) -> None:
        for call in (plugged.read, plugged.listdir, lambda p: plugged.write(p, value)):
            with contextlib.suppress(KernelError):
                call(path)

    act()
    plugged.validate()


@pytest.mark.parametrize(
    "description",
    [
        {"cmdline": "acpi_no_memhotplug"},
        {"slots": 0},
        {"pdpe1gb": False},
        {"probe": False},
        {"nodes": [{"memory": "1G"}, {"soft_reserved": "1G"}], "cmdline": "acpi_no_memhotplug"},
    ],
    ids=str,
)
def test_whatever_a_machine_lists_is_there(description: dict[str, object]) -> None:
    m = Machine(MachineConfig.from_dict(description))
    assert sum(1 for _ in entries(m)) > 100
    there = "acpi_no_memhotplug" not in str(description)
    assert m.listdir("/sys/firmware/acpi/hotplug") == ["memory"] * there
