"""Memory groups, and the policy that looks at them."""

from __future__ import annotations

import errno

import pytest

from kmm import KernelError, Machine
from kmm import memory_hotplug as mh
from kmm.memory_group import (
    memory_group_register_dynamic,
    memory_group_register_static,
    memory_group_unregister,
)
from tests.conftest import DIMM, two_nodes

BLOCK = 128 << 20
AUTO = "memhp_default_state=online memory_hotplug.online_policy=auto-movable "


def add(m: Machine, mgid: int, index: int, blocks: int = 1) -> None:
    flags = mh.MHP_NID_IS_MGID
    mh.add_memory(m, mgid, DIMM + index * BLOCK, blocks * BLOCK, flags)


def test_ids_are_the_lowest_free_ones(m: Machine) -> None:
    assert [memory_group_register_static(m, 1, 100) for _ in range(3)] == [0, 1, 2]
    memory_group_unregister(m, 1)
    assert memory_group_register_dynamic(m, 0, 32768) == 1
    m.validate()


@pytest.mark.parametrize(
    ("register", "code"),
    [
        (lambda m: memory_group_register_static(m, 9, 100), errno.EINVAL),
        (lambda m: memory_group_register_static(m, 1, 0), errno.EINVAL),
        (lambda m: memory_group_register_dynamic(m, 1, 32767), errno.EINVAL),
        (lambda m: memory_group_register_dynamic(m, 1, 16384), errno.EINVAL),
        (lambda m: memory_group_unregister(m, 5), errno.EINVAL),
    ],
)
def test_refusals(m: Machine, register, code: int) -> None:
    with pytest.raises(KernelError) as e:
        register(m)
    assert e.value.errno == code
    assert m.memory_groups == {}


def test_a_group_with_blocks_stays(m: Machine) -> None:
    mgid = memory_group_register_static(m, 1, 32768)
    add(m, mgid, 0)
    with pytest.raises(KernelError) as e:
        memory_group_unregister(m, mgid)
    assert e.value.errno == errno.EBUSY
    mh.remove_memory(m, DIMM, BLOCK)
    memory_group_unregister(m, mgid)
    m.validate()


def test_a_static_group_is_decided_as_a_whole() -> None:
    """1 GiB at boot allows 301 % of its present pages as Movable; a whole DIMM fits or not."""
    m = two_nodes(AUTO)
    early = sum(z.present_early_pages for z in m.nodes[0].zones)
    assert early == 262014
    m.plug("a", 0, DIMM, 16 * BLOCK)
    m.plug("b", 0, DIMM + 16 * BLOCK, 8 * BLOCK)
    assert m.nodes[0].zone(3).present_pages == 24 * 32768 <= early * 301 // 100
    m.plug("c", 0, DIMM + 24 * BLOCK, 8 * BLOCK)
    assert m.nodes[0].zone(2).present_pages == 8 * 32768
    m.validate()


def test_a_node_without_boot_memory_gets_no_movable_while_numa_aware() -> None:
    m = two_nodes(AUTO)
    m.plug("a", 1, DIMM, BLOCK)
    assert m.nodes[1].zone(2).present_pages == 32768
    m.write("/sys/module/memory_hotplug/parameters/auto_movable_numa_aware", "N")
    m.plug("b", 1, DIMM + BLOCK, BLOCK)
    assert m.nodes[1].zone(3).present_pages == 32768
    m.validate()


def test_ratio_zero_means_kernel_memory() -> None:
    m = two_nodes(AUTO + "memory_hotplug.auto_movable_ratio=0")
    m.plug("a", 0, DIMM, BLOCK)
    assert m.nodes[0].zone(3).present_pages == 0
    m.validate()


def test_a_dynamic_group_counts_its_own_kernel_memory() -> None:
    """Its units follow one zone; a group's Movable memory is spoken for in others' eyes."""
    m = two_nodes(AUTO + "memory_hotplug.auto_movable_ratio=50")
    mgid = memory_group_register_dynamic(m, 0, 2 * 32768)
    add(m, mgid, 0)
    zone = m.memory_blocks[32].zone
    assert zone is not None and zone.zone_idx == 3
    add(m, mgid, 1)
    assert m.memory_blocks[33].zone is zone
    other = memory_group_register_dynamic(m, 0, 32768)
    add(m, other, 4)
    group = m.memory_groups[other]
    assert group.present_movable_pages + group.present_kernel_pages == 32768
    m.validate()
