"""Special-purpose memory: a dax device between its drivers, as a real 6.1 does it."""

from __future__ import annotations

import errno

import pytest

from kmm import KernelError, Machine
from kmm.errors import ConfigError, FirmwareRefused, InvalidArgument
from kmm.params import GiB, MachineConfig, MiB
from kmm.snapshot import differences, dump
from kmm.trace import FALLIBLE

D, HMEM = "/sys/bus/dax/drivers", "/sys/devices/platform/hmem.0"
MEMORY = "/sys/devices/system/memory"


def machine(size: str = "512M") -> Machine:
    return Machine(
        MachineConfig.from_dict(
            {
                "memory": "2G",
                "maxmem": "8G",
                "cpus": 2,
                "nodes": [{"cpus": "0-1", "memory": "2G"}, {"soft_reserved": size}],
            }
        )
    )


def regions(m: Machine) -> list[str]:
    lines = m.read("/proc/iomem").splitlines()
    at = next(i for i, line in enumerate(lines) if "hmem.0" in line)
    return [line.split(" : ")[1] for line in lines[at : at + 4] if line.lstrip()[0] == "1"]


def to_kmem(m: Machine) -> None:
    m.write(f"{D}/device_dax/unbind", "dax0.0")
    m.write(f"{D}/kmem/new_id", "dax0.0")


def test_the_memory_is_a_device_of_its_node_and_no_ram() -> None:
    m = machine()
    assert regions(m) == ["hmem.0", "Soft Reserved", "dax0.0"]
    show = {"size": "536870912", "align": "2097152", "resource": "0x100000000", "dev": "252:0"}
    show |= {"target_node": "1", "numa_node": "0", "modalias": "dax:t0"}
    for name, text in show.items():
        assert m.read(f"{HMEM}/dax0.0/{name}") == f"{text}\n"
    assert m.read("/sys/dev/char/252:0/mapping0/end") == "0x11fffffff\n"
    assert m.read("/sys/devices/system/node/online") == "0\n"
    assert "Soft Reserved\n" in [m.read(f"/sys/firmware/memmap/{i}/type") for i in m.firmware_map]
    assert not m.uevents
    m.validate()


def test_a_device_moves_to_kmem_and_back() -> None:
    m = machine()
    before = dump(m)
    to_kmem(m)
    assert regions(m) == ["hmem.0", "Soft Reserved", "dax0.0", "System RAM (kmem)"]
    assert m.uevents == [
        "unbind /devices/platform/hmem.0/dax0.0 dax",
        *[f"add /devices/system/memory/memory{b} memory" for b in range(32, 36)],
        "add /devices/system/node/node1 node",
        "bind /devices/platform/hmem.0/dax0.0 dax",
    ]
    assert m.read(f"{HMEM}/dax0.0/uevent").splitlines()[3] == "DRIVER=kmem"
    assert m.listdir(f"{D}/kmem")[1] == "dax0.0"
    for block in range(32, 36):
        m.write(f"{MEMORY}/memory{block}/state", "online_movable")
    assert m.nodes[1].managed_pages == 512 * MiB // 4096
    m.validate()
    for block in range(32, 36):
        m.write(f"{MEMORY}/memory{block}/state", "offline")
    m.write(f"{D}/kmem/unbind", "dax0.0")
    m.write(f"{D}/kmem/remove_id", "dax0.0")
    m.write(f"{D}/device_dax/bind", "dax0.0")
    assert regions(m) == ["hmem.0", "Soft Reserved", "dax0.0"]
    assert 32 not in m.memory_blocks and not m.memory_groups
    changed = differences(before, dump(m))
    assert not [c for c in changed if c.startswith(("/iomem", "/blocks", "/dax"))], changed
    m.validate()


def test_memory_that_is_online_outlives_its_driver() -> None:
    m = machine()
    to_kmem(m)
    m.write(f"{MEMORY}/memory32/state", "online_movable")
    m.write(f"{D}/kmem/unbind", "dax0.0")
    assert m.log[-2:] == [
        "removing memory fails, because memory [0x0000000100000000-0x0000000107ffffff] is onlined",
        "kmem dax0.0: mapping0: 0x100000000-0x11fffffff cannot be hotremoved until the next reboot",
    ]
    assert regions(m) == ["hmem.0", "Soft Reserved", "dax0.0", "System RAM (kmem)"]
    m.write(f"{MEMORY}/memory32/state", "offline")
    for driver, what in (("device_dax", "reserve range"), ("kmem", "reserve region")):
        with pytest.raises(KernelError, match="EBUSY"):
            m.write(f"{D}/{driver}/bind", "dax0.0")
        assert m.log[-2:] == [
            f"{driver} dax0.0: mapping0: 0x100000000-0x11fffffff could not {what}",
            f"{driver}: probe of dax0.0 failed with error -16",
        ]
    m.validate()


@pytest.mark.parametrize(
    ("file", "text", "code"),
    [
        ("kmem/bind", "dax0.0", "ENODEV"),  # nobody told it to
        ("kmem/bind", "junk", "ENODEV"),
        ("kmem/unbind", "junk", "ENODEV"),
        ("kmem/unbind", "dax0.0", "ENODEV"),
        ("device_dax/bind", "dax0.0", "EBUSY"),
        ("kmem/new_id", "junk", "EINVAL"),
        ("kmem/new_id", "", "EINVAL"),
        ("kmem/new_id", " dax0.0", "EINVAL"),
        ("kmem/new_id", "dax00.0", "EINVAL"),
        ("kmem/new_id", "dax0.0x", "EINVAL"),
        ("kmem/new_id", "dax9999999999.0", "EINVAL"),
        ("kmem/remove_id", "dax0", "EINVAL"),
    ],
)
def test_what_a_real_kernel_refuses(file: str, text: str, code: str) -> None:
    m = machine()
    before = dump(m)
    with pytest.raises(KernelError, match=code):
        m.write(f"{D}/{file}", text)
    assert dump(m) == before
    m.write(f"{D}/kmem/new_id", "dax-1.0")
    assert m.dax_devices["dax0.0"].driver == "device_dax"
    with pytest.raises(KernelError, match="EBUSY"):
        m.write(f"{D}/kmem/new_id", "dax0.0")
        m.write(f"{D}/kmem/bind", "dax0.0")
    m.validate()


def test_a_device_smaller_than_a_block_is_no_ram() -> None:
    m = machine("64M")
    to_kmem(m)
    assert m.log[-3:] == [
        "kmem dax0.0: mapping0: 0x100000000-0x103ffffff too small after alignment",
        "kmem dax0.0: rejecting DAX region without any memory after alignment",
        "kmem: probe of dax0.0 failed with error -22",
    ]
    with pytest.raises(InvalidArgument):
        m.write(f"{D}/kmem/bind", "dax0.0")
    m.validate()


@pytest.mark.parametrize(
    "name", ["add_memory_driver_managed", "__add_pages", "arch_add_memory", "sparse_add_section"]
)
def test_an_add_that_fails_leaves_nothing(name: str) -> None:
    assert name in FALLIBLE
    m = machine()
    m.write(f"{D}/device_dax/unbind", "dax0.0")
    m.write(f"{D}/kmem/remove_id", "dax0.0")
    m.dax_drivers["kmem"].ids.add("dax0.0")
    before = dump(m)
    m.trace().fail(name, errno.ENOMEM)
    with pytest.raises(KernelError, match="ENOMEM"):
        m.write(f"{D}/kmem/bind", "dax0.0")
    m.kprobes = None
    assert not differences(before, dump(m))
    m.write(f"{D}/kmem/bind", "dax0.0")
    m.validate()


def test_dimms_come_after_the_special_memory() -> None:
    m = machine()
    m.plug("d", 0, 5 * GiB, 512 * MiB)
    assert 40 in m.memory_blocks
    with pytest.raises(FirmwareRefused, match="usable range"):
        m.plug("e", 0, 4 * GiB, 512 * MiB)
    m.validate()


@pytest.mark.parametrize("value", ["1K", -1, "65T", None, [1]])
def test_a_wrong_size_is_named(value: object) -> None:
    with pytest.raises(ConfigError, match=r"machine.nodes\[0\].soft_reserved: "):
        MachineConfig.from_dict({"nodes": [{"memory": "1G", "soft_reserved": value}]})
