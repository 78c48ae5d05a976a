"""Tiers of memory: which nodes with memory are how near."""

from __future__ import annotations

from kmm import Machine
from kmm.params import MachineConfig
from kmm.sysfs import readlink

TIERS, BUS = "/sys/devices/virtual/memory_tiering", "/sys/bus/memory_tiering"
MEMORY = "/sys/devices/system/memory"


def test_a_node_is_in_the_tier_of_dram_while_it_has_memory() -> None:
    nodes = [{"cpus": "0", "memory": "1G"}, {"cpus": "1"}, {}]
    config = {"memory": "1G", "maxmem": "16G", "cpus": 2, "nodes": nodes}
    m = Machine(MachineConfig.from_dict(config))
    m.plug("d0", 2, 4 << 30, 256 << 20)
    assert m.listdir(TIERS) == ["memory_tier4", "power", "uevent"]
    shown = []
    for word in ("online_movable", "offline"):
        shown.append(m.read(f"{TIERS}/memory_tier4/nodelist"))
        m.write(f"{MEMORY}/memory32/state", word)
    shown.append(m.read(f"{TIERS}/memory_tier4/nodelist"))
    assert shown == ["0\n", "0,2\n", "0\n"]
    m.validate()


def test_memory_of_a_dax_device_is_farther() -> None:
    nodes = [{"cpus": "0-3", "memory": "2G"}, {"soft_reserved": "512M"}]
    config = {"memory": "2G", "maxmem": "16G", "cpus": 4, "nodes": nodes}
    m = Machine(MachineConfig.from_dict(config))
    m.write("/sys/bus/dax/drivers/device_dax/unbind", "dax0.0")
    m.write("/sys/bus/dax/drivers/kmem/new_id", "dax0.0")
    assert m.listdir(f"{BUS}/devices") == ["memory_tier4"]
    m.write(f"{MEMORY}/memory32/state", "online_movable")
    assert m.listdir(f"{BUS}/devices") == ["memory_tier22", "memory_tier4"]
    assert m.read(f"{TIERS}/memory_tier22/nodelist") == "1\n"
    assert m.read(f"{TIERS}/memory_tier4/nodelist") == "0\n"
    link = "../../../devices/virtual/memory_tiering/memory_tier22"
    assert readlink(m, f"{BUS}/devices/memory_tier22") == link
    m.write(f"{MEMORY}/memory32/state", "offline")
    assert m.listdir(f"{BUS}/devices") == ["memory_tier4"]
    m.validate()
