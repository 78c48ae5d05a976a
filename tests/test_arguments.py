"""What callers hand over: checked before anything is changed, with the kernel's errno."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kmm import Machine
from kmm import memory_hotplug as mh
from kmm.errors import ImpossibleState, KernelError
from kmm.memory_block import walk_memory_blocks
from kmm.mmzone import MemoryGroup
from kmm.snapshot import differences, dump
from tests.conftest import DIMM, two_nodes

BLOCK = 128 << 20
PFN, PAGES = DIMM >> 12, BLOCK >> 12
STATE = "/sys/devices/system/memory/memory32/state"
A = ("a", 1, DIMM, 4 * BLOCK)


def unchanged(m: Machine, act: Callable[[], object], error: type[Exception]) -> Any:
    """Expect an error, and the machine exactly as it was."""
    before, dimms = dump(m), dict(m.dimms)
    with pytest.raises(error) as e:
        act()
    assert differences(before, dump(m)) == []
    assert m.dimms == dimms
    return e.value


WRONG: list[tuple[str, Callable[[Machine], object], int, str]] = [
    ("add", lambda m: mh.add_memory(m, 1, DIMM, 1.5), errno.EINVAL, "size: 1.5"),  # type: ignore
    ("add", lambda m: mh.add_memory(m, 1, "x", BLOCK), errno.EINVAL, "start: 'x'"),  # type: ignore
    ("add", lambda m: mh.add_memory(m, [], DIMM, BLOCK), errno.EINVAL, "nid: []"),  # type: ignore
    ("add", lambda m: mh.add_memory(m, 9, DIMM, BLOCK), errno.EINVAL, "node 9"),
    ("add", lambda m: mh.add_memory(m, 1, DIMM, BLOCK, "x"), errno.EINVAL, "mhp_flags"),  # type: ignore
    ("add", lambda m: mh.add_memory(m, 1, DIMM, 0), errno.E2BIG, "size: 0; allowed: whole"),
    ("add", lambda m: mh.add_memory(m, 1, DIMM, -BLOCK), errno.E2BIG, "size: -134217728"),
    ("add", lambda m: mh.add_memory(m, 1, -BLOCK, BLOCK), errno.E2BIG, "allowed: from 0x0"),
    ("range", lambda m: mh.mhp_range_allowed(m, DIMM, 0), errno.E2BIG, "size: 0; allowed"),
    (
        "name",
        lambda m: mh.register_memory_resource(m, 20 << 30, 1 << 30, None),
        errno.EINVAL,
        "name",
    ),  # type: ignore
    ("name", lambda m: mh.add_memory_driver_managed(m, 1, DIMM, BLOCK, None), errno.EINVAL, "name"),  # type: ignore
    ("res", lambda m: mh.add_memory_resource(m, 1, None), errno.EINVAL, "res: None"),  # type: ignore
    ("altmap", lambda m: mh.__add_pages(m, 1, PFN, PAGES, 5), errno.EINVAL, "altmap: 5"),  # type: ignore
    ("remove", lambda m: mh.remove_memory(m, "x", BLOCK), errno.EINVAL, "start: 'x'"),  # type: ignore
    ("remove", lambda m: mh.remove_memory(m, -BLOCK, BLOCK), errno.EINVAL, "start: -13"),
    ("offline", lambda m: mh.offline_and_remove_memory(m, None, 1), errno.EINVAL, "start"),  # type: ignore
    ("node", lambda m: mh.try_offline_node(m, 9), errno.EINVAL, "nid: 9; allowed: 0, 1"),
    ("node", lambda m: mh.__try_online_node(m, 9), errno.EINVAL, "nid: 9; allowed: 0, 1"),
    ("node", lambda m: mh.hotadd_init_pgdat(m, 9), errno.EINVAL, "nid: 9; allowed: 0, 1"),
    ("zone", lambda m: mh.zone_for_pfn_range(m, 1, 9, None, PFN, PAGES), errno.EINVAL, "nid: 9"),
    (
        "type",
        lambda m: mh.zone_for_pfn_range(m, 4, 1, None, PFN, 1),
        errno.EINVAL,
        "online_type: 4",
    ),
    ("pfn", lambda m: mh.online_pages(m, "x", PAGES, m.nodes[1].zone(3)), errno.EINVAL, "pfn"),  # type: ignore
    ("zone", lambda m: mh.online_pages(m, PFN, PAGES, None), errno.EINVAL, "zone: None"),  # type: ignore
    (
        "zone",
        lambda m: mh.online_pages(m, PFN, PAGES, two_nodes().nodes[1].zone(3)),
        errno.EINVAL,
        "of another",
    ),
    (
        "group",
        lambda m: mh.online_pages(m, PFN, PAGES, m.nodes[1].zone(3), MemoryGroup(0, 1, False)),
        errno.EINVAL,
        "group: not",
    ),
    ("zone", lambda m: mh.offline_pages(m, PFN, PAGES, 3), errno.EINVAL, "zone: 3"),  # type: ignore
    ("block", lambda m: mh.memory_block_online(m, None), errno.EINVAL, "block: None"),  # type: ignore
    ("block", lambda m: mh.memory_block_offline(m, 32), errno.EINVAL, "block: 32"),  # type: ignore
    ("plug", lambda m: m.plug("d", 1, DIMM, BLOCK, crs=((DIMM,),)), errno.EINVAL, "crs[0]"),  # type: ignore
    ("plug", lambda m: m.plug("d", 1, DIMM, BLOCK, sta=None), errno.EINVAL, "sta: None"),  # type: ignore
    ("unplug", lambda m: m.unplug([]), errno.EINVAL, "dimm_id: []"),  # type: ignore
    ("notify", lambda m: m.notify("a", []), errno.EINVAL, "event: []"),  # type: ignore
    ("container", lambda m: m.unplug_container([]), errno.EINVAL, "name: []"),  # type: ignore
    ("container", lambda m: m.plug_container(None), errno.EINVAL, "dimms: None"),  # type: ignore
    ("container", lambda m: m.plug_container([A, 5]), errno.EINVAL, "dimms[1]: 5"),  # type: ignore
    ("container", lambda m: m.plug_container([A, ("b", 1)]), errno.EINVAL, "dimms[1]: ('b', 1)"),  # type: ignore
    (
        "container",
        lambda m: m.plug_container([A, ("b", 1, "x", BLOCK)]),
        errno.EINVAL,
        "start: 'x'",
    ),  # type: ignore
]


@pytest.mark.parametrize(("what", "act", "code", "words"), WRONG)
def test_what_no_caller_could_mean_is_refused_and_changes_nothing(
    m: Machine, what: str, act: Callable[[Machine], object], code: int, words: str
) -> None:
    error = unchanged(m, lambda: act(m), KernelError)
    assert error.errno == code
    assert words in str(error), what
    m.validate()


def test_numpy_numbers_are_numbers(m: Machine) -> None:
    mh.add_memory(m, np.int64(1), np.uint64(DIMM), np.uint64(BLOCK))
    block = m.memory_blocks[32]
    mh.remove_memory(m, np.uint64(DIMM), np.int64(BLOCK))
    assert block.block_id not in m.memory_blocks
    m.validate()


@pytest.mark.parametrize("where", ["remove_memory", "__remove_pages", "online_pages"])
def test_addresses_beyond_the_section_table_stop_with_the_functions_name(
    m: Machine, where: str
) -> None:
    acts: dict[str, Callable[[], object]] = {
        "remove_memory": lambda: mh.remove_memory(m, 1 << 60, 1 << 30),
        "__remove_pages": lambda: mh.__remove_pages(m, 1 << 50, 1 << 15),
        "online_pages": lambda: mh.online_pages(m, 1 << 50, 1 << 15, m.nodes[1].zone(3)),
    }
    error = unchanged(m, acts[where], ImpossibleState)
    assert str(error).startswith("try_remove_memory: " if where == "remove_memory" else where)
    m.validate()


def test_pages_that_do_not_exist_do_not_come_online(m: Machine) -> None:
    zone = m.nodes[1].zone(3)
    error = unchanged(m, lambda: mh.online_pages(m, PFN, PAGES, zone), ImpossibleState)
    assert str(error) == "online_pages: section 32 does not exist"
    mh.__add_pages(m, 1, PFN, 512)
    error = unchanged(m, lambda: mh.online_pages(m, PFN, PAGES, zone), ImpossibleState)
    assert str(error) == "online_pages: section 32 does not exist"
    mh.__remove_pages(m, PFN, 512)
    m.validate()


def test_what_is_online_does_not_come_online_again_nor_lose_its_memmap(m: Machine) -> None:
    mh.add_memory(m, 1, DIMM, BLOCK)
    m.write(STATE, "online_movable")
    zone, block = m.nodes[1].zone(3), m.memory_blocks[32]
    for act, words in (
        (lambda: mh.online_pages(m, PFN, PAGES, zone), "online_pages: section 32 is online"),
        (lambda: mh.memory_block_online(m, block), "online_pages: section 32 is online"),
        (lambda: mh.__remove_pages(m, PFN, PAGES), "__remove_pages: section 32 is online"),
    ):
        assert str(unchanged(m, act, ImpossibleState)) == words
        m.validate()


def test_a_block_with_its_own_memmap_does_not_come_online_again() -> None:
    m = two_nodes("memory_hotplug.memmap_on_memory=1")
    m.plug("a", 1, DIMM, BLOCK)
    m.write(STATE, "online_movable")
    block = m.memory_blocks[32]
    error = unchanged(m, lambda: mh.memory_block_online(m, block), ImpossibleState)
    assert str(error) == "memory_block_online: section 32 is online"
    m.validate()


def test_pages_that_are_offline_do_not_go_offline_again(m: Machine) -> None:
    mh.add_memory(m, 1, DIMM, BLOCK)
    m.write(STATE, "online_movable")
    m.write(STATE, "offline")
    zone = m.nodes[1].zone(3)
    error = unchanged(m, lambda: mh.offline_pages(m, PFN, PAGES, zone), ImpossibleState)
    assert str(error) == "offline_pages: section 32 is not online"
    m.validate()


@pytest.mark.parametrize("start", [DIMM, DIMM - BLOCK])
def test_removing_passes_over_blocks_that_are_not_there(m: Machine, start: int) -> None:
    mh.add_memory(m, 1, DIMM, BLOCK)
    mh.remove_memory(m, start, 2 * BLOCK)
    assert 32 not in m.memory_blocks
    m.validate()


@pytest.mark.parametrize("remove", ["remove_memory", "try_remove_memory", "__remove_memory"])
@pytest.mark.parametrize(
    ("start", "size"),
    [
        (1 << 32, 1 << 40),
        (1 << 32, 3 << 27),
        (1 << 40, 1 << 28),
        ((1 << 40) - (1 << 27), 1 << 28),
        (1 << 40, 1 << 40),
    ],
)
def test_removing_what_is_there_in_part_or_not_at_all(
    m: Machine, remove: str, start: int, size: int
) -> None:
    """RAM ends at 1 GiB, two blocks are at 4 GiB; the ranges begin and end beside page tables."""
    mh.add_memory(m, 1, DIMM, 2 * BLOCK)
    getattr(mh, remove)(m, start, size)
    gone = start == DIMM
    assert (32 in m.memory_blocks) == (33 in m.memory_blocks) == (not gone)
    assert m.sections["flags"][32:34].any() == (not gone)
    assert (1 in m.n_online) == (not gone)
    m.validate()


def test_removing_sections_of_several_page_tables_around_a_hole() -> None:
    """Blocks on both sides of the first and of the second boundary of 64 GiB, none between."""
    m = two_nodes(maxmem="256G")
    starts = [(64 << 30) - BLOCK, 64 << 30, (128 << 30) - BLOCK, 128 << 30]
    for start in starts:
        mh.add_memory(m, 1, start, BLOCK)
    mh.remove_memory(m, starts[0], starts[-1] + BLOCK - starts[0])
    assert not set(m.memory_blocks) & set(range(8, 2048))
    assert not m.sections["flags"][8:2048].any()
    m.validate()


def test_a_range_larger_than_the_address_space_ends_at_once(m: Machine) -> None:
    mh.add_memory(m, 1, DIMM, BLOCK)
    error = unchanged(m, lambda: mh.offline_and_remove_memory(m, 1 << 62, 1 << 62), ImpossibleState)
    assert str(error).startswith("offline_and_remove_memory: 0x4000000000000000+")
    m.validate()


def test_walking_a_large_range_asks_only_the_blocks_there_are(m: Machine) -> None:
    mh.add_memory(m, 1, DIMM, 2 * BLOCK)
    seen: list[int] = []
    for start, size in ((DIMM - 1, 1 << 63), (DIMM, BLOCK + 1), (DIMM + BLOCK, 1), (DIMM, 0)):
        walk_memory_blocks(m, start, size, lambda block: seen.append(block.block_id))
        seen.append(0)
    assert seen == [32, 33, 0, 32, 33, 0, 33, 0, 0]


def test_more_containers_than_a_byte_can_number() -> None:
    m = two_nodes(slots=256, maxmem="64G")
    names = set()
    for i in range(258):
        name, _ = m.plug_container([(f"d{i}", 1, DIMM, BLOCK)])
        names.add(name)
        device = m.acpi_containers[name].children[0]
        # The container stays while what is in it goes by itself.
        assert device.dimm is not None and m.unplug(device.dimm.dimm_id) == 0
    assert len(names) == 258
