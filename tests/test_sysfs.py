"""The tree of files: texts, modes, links, and the errno of every wrong access."""

from __future__ import annotations

import errno

import pytest

from kmm import KernelError, Machine
from kmm.snapshot import differences, dump
from kmm.sysfs import readlink, stat
from kmm.sysfs_entry import kstrtobool, kstrtoull
from tests.conftest import DIMM, two_nodes

MEMORY, NODE = "/sys/devices/system/memory", "/sys/devices/system/node"
MODULE = "/sys/module/memory_hotplug/parameters"
BLOCK = 128 << 20


@pytest.fixture
def plugged() -> Machine:
    m = two_nodes()
    m.plug("a", 1, DIMM, 2 * BLOCK)
    return m


def walk(m: Machine, path: str) -> list[str]:
    out = []
    for name in m.listdir(path):
        entry = f"{path.rstrip('/')}/{name}"
        out.append(entry)
        if stat(m, entry).kind == "directory":
            out += walk(m, entry)
    return out


def test_everything_listed_exists_and_reads_or_refuses(plugged: Machine) -> None:
    paths = walk(plugged, "/")
    assert len(paths) > 150
    for path in paths:
        what = stat(plugged, path)
        if what.kind == "link":
            assert readlink(plugged, path)
        elif path.endswith("/power/autosuspend_delay_ms"):
            with pytest.raises(KernelError, match="EIO"):
                plugged.read(path)
        elif path == "/proc/kpageflags":
            with pytest.raises(KernelError, match="EINVAL"):
                plugged.read(path)
        elif what.kind == "file" and what.mode & 0o444:
            assert isinstance(plugged.read(path), str)
        elif what.kind == "file":
            with pytest.raises(KernelError) as e:
                plugged.read(path)
            assert e.value.errno == errno.EACCES
    plugged.validate()


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (f"{MEMORY}/block_size_bytes", "8000000\n"),
        (f"{MEMORY}/auto_online_blocks", "offline\n"),
        (f"{MEMORY}/memory32/state", "offline\n"),
        (f"{MEMORY}/memory32/online", "0\n"),
        (f"{MEMORY}/memory32/phys_index", "00000020\n"),
        (f"{MEMORY}/memory32/phys_device", "0\n"),
        (f"{MEMORY}/memory32/removable", "1\n"),
        (f"{MEMORY}/memory32/valid_zones", "Normal Movable\n"),
        (f"{MEMORY}/memory0/valid_zones", "none\n"),
        (f"{MEMORY}/memory3/valid_zones", "DMA32\n"),
        (f"{NODE}/node1/memory32/state", "offline\n"),
        (f"{MEMORY}/memory32/node1/distance", "20 10\n"),
        ("/sys/bus/memory/devices/memory32/state", "offline\n"),
        (f"{NODE}/possible", "0-1\n"),
        (f"{NODE}/has_generic_initiator", "\n"),
        (f"{NODE}/node1/cpulist", "\n"),
        (f"{NODE}/node1/cpumap", "0\n"),
        (f"{NODE}/node0/cpumap", "3\n"),
        (f"{NODE}/node1/numastat", None),
        ("/sys/firmware/memmap/9/start", "0x100000000\n"),
        ("/sys/firmware/memmap/9/type", "System RAM\n"),
        (f"{MODULE}/auto_movable_ratio", "301\n"),
        ("/sys/kernel/mm/transparent_hugepage/enabled", "[always] madvise never\n"),
    ],
)
def test_texts(plugged: Machine, path: str, text: str | None) -> None:
    assert text is None or plugged.read(path) == text


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        (f"{MEMORY}/auto_online_blocks", 0o644),
        (f"{MEMORY}/block_size_bytes", 0o444),
        (f"{MEMORY}/probe", 0o200),
        (f"{MEMORY}/memory32/state", 0o644),
        (f"{NODE}/node1/compact", 0o200),
        (f"{MODULE}/memmap_on_memory", 0o444),
        ("/proc/pagetypeinfo", 0o400),
    ],
)
def test_modes(plugged: Machine, path: str, mode: int) -> None:
    assert stat(plugged, path).mode == mode


def test_links(plugged: Machine) -> None:
    assert readlink(plugged, f"{MEMORY}/memory32/node1") == "../../node/node1"
    assert readlink(plugged, f"{NODE}/node1/memory32") == "../../memory/memory32"
    assert readlink(plugged, f"{MEMORY}/memory32/firmware_node").endswith("PNP0C80:00")
    acpi = "/sys/bus/acpi/devices/PNP0C80:00/physical_node1"
    assert readlink(plugged, acpi) == "../../../../system/memory/memory33"
    assert "cpu1" in plugged.listdir(f"{NODE}/node0")


@pytest.mark.parametrize(
    ("path", "value", "code"),
    [
        (f"{MEMORY}/memory32/state", "bogus", errno.EINVAL),
        (f"{MEMORY}/memory32/state", "", errno.EINVAL),
        (f"{MEMORY}/memory32/state", "online ", errno.EINVAL),
        (f"{MEMORY}/memory32/state", "offline", errno.EINVAL),
        (f"{MEMORY}/memory32/online", "2", errno.EINVAL),
        (f"{MEMORY}/memory32/removable", "1", errno.EACCES),
        (f"{MEMORY}/memory32/nosuch", "1", errno.EACCES),
        (f"{MEMORY}/memory32", "1", errno.EISDIR),
        (f"{MEMORY}/memory99/state", "online", errno.ENOENT),
        (f"{MEMORY}/auto_online_blocks", "sideways", errno.EINVAL),
        (f"{MEMORY}/probe", "add", errno.EINVAL),
        (f"{MEMORY}/probe", "", errno.EINVAL),
        (f"{MEMORY}/probe", "-1", errno.EINVAL),
        (f"{MEMORY}/probe", "0x100000001", errno.EINVAL),
        (f"{MEMORY}/probe", "0x100000000", errno.EEXIST),
        (f"{MEMORY}/probe", "0x400000000000", errno.E2BIG),
        (f"{MEMORY}/probe", "0x10000000000000000", errno.ERANGE),
        (f"{MEMORY}/soft_offline_page", "zzz", errno.EINVAL),
        (f"{MEMORY}/soft_offline_page", "0x400000000", errno.ENXIO),
        (f"{MEMORY}/soft_offline_page", "0x100000000", errno.EIO),
        (f"{MEMORY}/hard_offline_page", "0x100000000", errno.ENXIO),
        (f"{NODE}/online", "1", errno.EACCES),
        (f"{NODE}/node9/compact", "1", errno.ENOENT),
        ("/proc/iomem", "x", errno.EIO),
        ("/proc/sys/vm/nosuch", "1", errno.ENOENT),
        ("/proc/sys/vm/min_free_kbytes", "-1", errno.EINVAL),
        ("/proc/sys/vm/min_free_kbytes", "zebra", errno.EINVAL),
        ("/proc/sys/vm/min_free_kbytes", "99999999999", errno.EINVAL),
        ("/proc/sys/vm/watermark_scale_factor", "0", errno.EINVAL),
        ("/proc/sys/vm/watermark_scale_factor", "3001", errno.EINVAL),
        ("/proc/sys/vm/percpu_pagelist_high_fraction", "7", errno.EINVAL),
        (f"{MODULE}/online_policy", "bogus", errno.EINVAL),
        (f"{MODULE}/auto_movable_ratio", "-3", errno.EINVAL),
        (f"{MODULE}/auto_movable_ratio", "4294967296", errno.ERANGE),
        (f"{MODULE}/memmap_on_memory", "1", errno.EACCES),
        ("/sys/firmware/acpi/hotplug/memory/enabled", "7", errno.EINVAL),
        ("/sys/kernel/mm/transparent_hugepage/enabled", "bogus", errno.EINVAL),
    ],
)
def test_a_refused_write_changes_nothing(
    plugged: Machine, path: str, value: str, code: int
) -> None:
    before = dump(plugged)
    with pytest.raises(KernelError) as e:
        plugged.write(path, value)
    assert e.value.errno == code
    assert differences(before, dump(plugged)) == []
    plugged.validate()


def test_reading_what_is_not_there(plugged: Machine) -> None:
    for path, code in (
        ("/nowhere", errno.ENOENT),
        (MEMORY, errno.EISDIR),
        (f"{MEMORY}/probe", errno.EACCES),
    ):
        with pytest.raises(KernelError) as e:
            plugged.read(path)
        assert e.value.errno == code
    with pytest.raises(KernelError) as e:
        plugged.listdir("/proc/iomem")
    assert e.value.errno == errno.ENOTDIR


def test_probe_adds_one_block_to_the_first_node(m: Machine) -> None:
    m.write(f"{MEMORY}/probe", "0x100000000")
    assert m.read(f"{MEMORY}/memory32/state") == "offline\n"
    assert m.memory_blocks[32].nid == 0
    m.validate()


def test_probe_takes_the_word_add_where_the_machine_says_so() -> None:
    m = two_nodes("acpi_no_memhotplug", probe_add=True)
    with pytest.raises(KernelError) as e:
        m.write(f"{MEMORY}/probe", "add")
    assert e.value.errno == errno.ENODEV
    m.plug("a", 1, DIMM + 2 * BLOCK, 2 * BLOCK)
    m.plug("b", 1, DIMM, 2 * BLOCK)
    m.write(f"{MEMORY}/probe", "add")
    assert {34, 35} <= set(m.memory_blocks) and 32 not in m.memory_blocks
    assert m.memory_blocks[34].nid == 1
    assert "110000000-11fffffff : System RAM" in m.read("/proc/iomem")
    m.validate()
    m.write(f"{MEMORY}/probe", "add")
    assert {32, 33} <= set(m.memory_blocks)
    with pytest.raises(KernelError) as e:
        m.write(f"{MEMORY}/probe", "add")
    assert e.value.errno == errno.ENODEV
    m.validate()


def test_probing_for_a_dimm_adds_all_of_it_or_nothing() -> None:
    """The second block fails once, and then a DIMM of a block and a bit always does."""
    m = two_nodes("acpi_no_memhotplug", probe_add=True)
    m.plug("a", 1, DIMM, 2 * BLOCK)
    before = dump(m)
    m.trace(recording=False).fail("add_memory_block", errno.ENOMEM, 2)
    with pytest.raises(KernelError) as e:
        m.write(f"{MEMORY}/probe", "add")
    assert e.value.errno == errno.ENOMEM
    m.kprobes = None
    assert differences(before, dump(m)) == []
    m.write(f"{MEMORY}/probe", "add")
    assert {32, 33} <= set(m.memory_blocks)
    m.plug("b", 1, DIMM + 4 * BLOCK, BLOCK + (2 << 20))
    before = dump(m)
    for _ in range(2):
        with pytest.raises(KernelError) as e:
            m.write(f"{MEMORY}/probe", "add")
        assert e.value.errno == errno.EINVAL
    assert differences(before, dump(m)) == []
    m.validate()


def test_synthetic_uevents(plugged: Machine) -> None:
    plugged.write(f"{MEMORY}/memory32/uevent", "change")
    assert plugged.uevents[-1] == "change /devices/system/memory/memory32 memory"
    with pytest.raises(KernelError):
        plugged.write(f"{MEMORY}/memory32/uevent", "bogus")
    assert plugged.log[-2:] == [
        "synth uevent: /devices/system/memory/memory32: unknown uevent action string",
        "memory memory32: uevent: failed to send synthetic uevent: -22",
    ]


def test_memmap_numbers_are_never_used_twice(m: Machine) -> None:
    for _ in range(3):
        m.plug("d", 1, DIMM, BLOCK)
        m.unplug("d")
    m.plug("last", 1, DIMM, BLOCK)
    assert m.read("/sys/firmware/memmap/12/end") == "0x107ffffff\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", True), ("y\n", True), ("Yes", True), ("t", True), ("on", True), ("oN", True),
     ("0", False), ("No", False), ("f", False), ("OFF", False)],
)  # fmt: skip
def test_kstrtobool(text: str, value: bool) -> None:
    assert kstrtobool(text) is value


@pytest.mark.parametrize("text", ["", "2", "x", "o", "ox", " 1"])
def test_kstrtobool_refuses(text: str) -> None:
    with pytest.raises(KernelError):
        kstrtobool(text)


@pytest.mark.parametrize(
    ("text", "value"), [("0x10\n", 16), ("010", 8), ("17", 17), ("+3", 3), ("0", 0)]
)
def test_kstrtoull(text: str, value: int) -> None:
    assert kstrtoull(text) == value


@pytest.mark.parametrize("text", ["", "-1", "1 ", "0x", "08", "1k", "1\n\n"])
def test_kstrtoull_refuses(text: str) -> None:
    with pytest.raises(KernelError):
        kstrtoull(text)


@pytest.mark.parametrize(
    ("value", "stored"), [("-16", -16), ("-0x10", -16), ("5", 0), ("-5000", -4095), ("0", 0)]
)
def test_notifier_errors_are_clamped_to_errnos(m: Machine, value: str, stored: int) -> None:
    path = "/sys/kernel/debug/notifier-error-inject/memory/actions/MEM_GOING_ONLINE/error"
    m.write(path, value)
    assert m.read(path) == f"{stored}\n"
    for bad in ("zebra", "", " -3", "--3"):
        with pytest.raises(KernelError):
            m.write(path, bad)
    assert m.read(path) == f"{stored}\n"
    m.validate()
