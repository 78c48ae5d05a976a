"""Adding, onlining, offlining and removing (test_trace.py makes each chain fail at each step).

Most tests use one address line: node 0 has RAM from 0 to 1 GiB, a DIMM of four 128 MiB blocks
(memory32 to memory35) goes to node 1 at 4 GiB.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from kmm import Machine
from kmm import memory_hotplug as mh
from kmm.errors import ImpossibleState, KernelError, OperationNotPermitted, OutOfMemory
from kmm.gfp import GFP_HIGHUSER_MOVABLE, GFP_KERNEL
from kmm.memory_block import (
    ACTION_NAMES,
    MemoryNotifier,
    MemoryNotify,
    register_memory_notifier,
    unregister_memory_notifier,
)
from kmm.page_alloc import drain_all_pages
from kmm.resource import iomem_show
from kmm.snapshot import differences, dump
from tests.conftest import DIMM, two_nodes

BLOCK = 128 << 20
STATE = "/sys/devices/system/memory/memory%d/state"


def add(m: Machine) -> None:
    mh.add_memory(m, 1, DIMM, 4 * BLOCK)


def refused(m: Machine, act: Callable[[], object], code: int) -> None:
    """Expect an errno, and the machine exactly as it was."""
    before = dump(m)
    with pytest.raises(KernelError) as e:
        act()
    assert e.value.errno == code
    assert differences(before, dump(m)) == []
    m.validate()


# -- adding -----------------------------------------------------------------------------


def test_add_makes_offline_blocks_and_the_node(m: Machine) -> None:
    add(m)
    assert m.read("/sys/devices/system/node/online") == "0-1\n"
    assert m.read("/sys/devices/system/node/has_memory") == "0\n"
    assert m.read(STATE % 35) == "offline\n"
    assert "100000000-11fffffff : System RAM" in iomem_show(m.iomem_resource)
    assert m.uevents == [
        *(f"add /devices/system/memory/memory{b} memory" for b in range(32, 36)),
        "add /devices/system/node/node1 node",
    ]
    m.validate()


def test_add_of_what_exists_is_eexist(m: Machine) -> None:
    add(m)
    refused(m, lambda: mh.add_memory(m, 1, DIMM + BLOCK, BLOCK), errno.EEXIST)
    refused(m, lambda: mh.add_memory(m, 0, 0x8000000, BLOCK), errno.EEXIST)


@pytest.mark.parametrize(
    ("start", "size", "code"),
    [
        (DIMM, BLOCK + 4096, errno.EINVAL),
        (DIMM + 4096, BLOCK, errno.EINVAL),
        (DIMM, 0, errno.E2BIG),
        (1 << 46, BLOCK, errno.E2BIG),
        ((1 << 64) - BLOCK, 2 * BLOCK, errno.E2BIG),
    ],
)
def test_add_of_an_impossible_range(m: Machine, start: int, size: int, code: int) -> None:
    refused(m, lambda: mh.add_memory(m, 1, start, size), code)


def test_add_to_an_impossible_node_is_einval(m: Machine) -> None:
    refused(m, lambda: mh.add_memory(m, 7, DIMM, BLOCK), errno.EINVAL)
    assert "node 7 was absent from the node_possible_map" in m.log[-1]


def test_memory_shortage_refuses_the_add(m: Machine) -> None:
    """The memmap needs 2 MiB per section; with no memory left there is none."""
    held = [(m.alloc_pages_bulk(1 << 20, order), order) for order in (10, 5, 0)]
    with pytest.raises(OutOfMemory):
        while True:
            m.alloc_pages()
    refused(m, lambda: add(m), errno.ENOMEM)
    for pfns, order in held:
        m.free_pages_bulk(pfns, order)
    add(m)
    m.validate()


def test_memmap_of_base_pages_when_no_large_block_is_left(m: Machine) -> None:
    """With free memory in small pieces only, 512 single pages hold a section's memmap."""
    pfns = m.alloc_pages_bulk(1 << 20, 0).tolist()
    with pytest.raises(OutOfMemory):
        while True:
            pfns.append(m.alloc_pages())
    # What the watermarks keep back is taken too, so that no large block is left.
    for zone in m.nodes[0].zones[:2]:
        while zone.rmqueue(9, 1) >= 0:
            pass
        zone.drain()
        while zone.rmqueue(9, 1) >= 0:
            pass
    m.free_pages_bulk(sorted(pfns)[::2])
    before = m.nodes[0].zone(1).nr_free_pages + m.nodes[0].zone(0).nr_free_pages
    mh.add_memory(m, 1, DIMM, BLOCK)
    assert len(next(iter(m.vmemmap_basepages.values()))) == 513  # and their page table
    m.validate()
    mh.remove_memory(m, DIMM, BLOCK)
    drain_all_pages(m)
    after = m.nodes[0].zone(1).nr_free_pages + m.nodes[0].zone(0).nr_free_pages
    assert after >= before
    m.validate()


def test_second_memmap_lands_in_the_node_and_pins_it(m: Machine) -> None:
    """DIMM two's memmap sits in DIMM one's Normal zone, so one cannot go before two."""
    mh.add_memory(m, 1, DIMM, BLOCK)
    m.write(STATE % 32, "online_kernel")
    mh.add_memory(m, 1, DIMM + (1 << 30), 2 * BLOCK)
    assert m.nodes[1].zone(2).nr_free_pages == 32768 - 2 * 512
    refused_errno = errno.EBUSY
    with pytest.raises(KernelError) as e:
        m.write(STATE % 32, "offline")
    assert e.value.errno == refused_errno
    mh.remove_memory(m, DIMM + (1 << 30), 2 * BLOCK)
    m.write(STATE % 32, "offline")
    m.validate()


# -- onlining ---------------------------------------------------------------------------


def veto(m: Machine, action: str, code: int) -> MemoryNotifier:
    def call(m: Machine, act: int, arg: MemoryNotify) -> int:
        return code if ACTION_NAMES[act] == action else 0

    notifier = MemoryNotifier("veto", call, 5)
    register_memory_notifier(m, notifier)
    return notifier


@pytest.mark.parametrize("code", [-errno.EBUSY, -errno.EPERM, -errno.ENOMEM])
def test_notifiers_veto_online_and_offline(m: Machine, code: int) -> None:
    add(m)
    notifier = veto(m, "MEM_GOING_ONLINE", code)
    for word in ("online", "online_kernel", "online_movable"):
        refused(m, lambda word=word: m.write(STATE % 33, word), -code)
    unregister_memory_notifier(m, notifier)
    m.write(STATE % 33, "online_movable")
    veto(m, "MEM_GOING_OFFLINE", code)
    refused(m, lambda: m.write(STATE % 33, "offline"), -code)


def test_a_cancel_reaches_every_notifier(m: Machine) -> None:
    add(m)
    heard: list[str] = []

    def listen(m: Machine, act: int, arg: MemoryNotify) -> int:
        heard.append(ACTION_NAMES[act])
        return 0

    register_memory_notifier(m, MemoryNotifier("listen", listen, 100))
    veto(m, "MEM_GOING_ONLINE", -errno.EPERM)
    with pytest.raises(OperationNotPermitted):
        m.write(STATE % 32, "online")
    assert heard == ["MEM_GOING_ONLINE", "MEM_CANCEL_ONLINE"]
    m.validate()


def test_spans_grow_over_holes_and_jump_back(m: Machine) -> None:
    """Movable blocks 33 and 35, then 34 by default (it lies between them); 33 leaves."""
    add(m)
    movable = m.nodes[1].zone(3)
    m.write(STATE % 33, "online_movable")
    m.write(STATE % 35, "online_movable")
    assert (movable.zone_start_pfn, movable.spanned_pages) == (1081344, 98304)
    assert m.read("/sys/devices/system/memory/memory34/valid_zones") == "Movable Normal\n"
    m.write(STATE % 34, "online")
    assert movable.present_pages == 98304
    m.write(STATE % 34, "offline")
    assert (movable.zone_start_pfn, movable.spanned_pages) == (1081344, 98304)
    m.write(STATE % 33, "offline")
    assert (movable.zone_start_pfn, movable.spanned_pages) == (1146880, 32768)
    m.write(STATE % 33, "online")
    assert m.nodes[1].zone(2).zone_start_pfn == 1081344
    m.validate()


def test_a_stale_wish_stays_after_a_failed_write(m: Machine) -> None:
    add(m)
    m.write(STATE % 32, "online_kernel")
    with pytest.raises(KernelError):
        m.write(STATE % 32, "online_movable")
    m.write("/sys/devices/system/memory/memory32/online", "0")
    m.write("/sys/devices/system/memory/memory32/online", "1")
    assert m.memory_blocks[32].zone is m.nodes[1].zone(3)
    m.validate()


# -- offlining --------------------------------------------------------------------------


def test_offline_of_a_used_kernel_block_is_ebusy_and_dumps_the_page(m: Machine) -> None:
    add(m)
    m.write(STATE % 32, "online_kernel")
    pfn = m.alloc_pages(nid=1)
    m.nodes[1].zone(2).drain()
    refused(m, lambda: m.write(STATE % 32, "offline"), errno.EBUSY)
    assert m.log[-1] == "page dumped because: unmovable page"
    m.free_pages(pfn)
    m.write(STATE % 32, "offline")
    m.validate()


def test_failed_offline_types_isolated_pageblocks_movable(m: Machine) -> None:
    """A kernel page in the middle: the first and last pageblock were isolated, and come back."""
    add(m)
    m.write(STATE % 32, "online_kernel")
    zone = m.nodes[1].zone(2)
    pfns = m.alloc_pages_bulk(30, 10, GFP_KERNEL, 1)
    first = m.memmap_engine.get_pageblock_migratetype(int(pfns[0]))
    assert first == 0
    m.free_pages(int(pfns[0]), 10)
    with pytest.raises(KernelError):
        m.write(STATE % 32, "offline")
    assert m.memmap_engine.get_pageblock_migratetype(int(pfns[0])) == 1
    m.free_pages_bulk(pfns[1:], 10)
    assert zone.nr_free_pages == 32768
    m.validate()


def test_failed_offline_drains_the_per_cpu_lists(m: Machine) -> None:
    """Parked pages of the whole zone, also of other blocks, are back on the free lists."""
    add(m)
    m.write(STATE % 32, "online_kernel")
    m.write(STATE % 33, "online_kernel")
    zone = m.nodes[1].zone(2)
    pfns = m.alloc_pages_bulk(3, 0, GFP_KERNEL, 1)
    m.free_pages_bulk(pfns[1:])
    assert zone.pcp_pages() > 0
    with pytest.raises(KernelError):
        m.write(STATE % 32, "offline")
    assert zone.pcp_pages() == 0
    assert zone.pcp_state(0)[1:3] == (zone.pageset_high, zone.pageset_batch)
    m.validate()


def test_failed_offline_puts_free_blocks_at_the_tails(m: Machine) -> None:
    """The isolated blocks of block 32 come back behind those of block 33."""
    add(m)
    m.write(STATE % 32, "online_movable")
    m.write(STATE % 33, "online_movable")
    movable = m.nodes[1].zone(3)
    before = movable.free_list(10, 1)
    assert before == list(range(DIMM >> 12, (DIMM >> 12) + 65536, 1024))
    veto(m, "MEM_GOING_OFFLINE", -errno.EBUSY)
    with pytest.raises(KernelError):
        m.write(STATE % 32, "offline")
    assert movable.free_list(10, 1) == before[32:] + before[:32]
    m.validate()


def test_offline_of_a_block_in_use_in_movable_is_refused(m: Machine) -> None:
    add(m)
    m.write(STATE % 32, "online_movable")
    pfn = m.alloc_pages(0, GFP_HIGHUSER_MOVABLE, 1)
    m.nodes[1].zone(3).drain()
    # Nobody knows whose it is, so it cannot move: the kernel would try for ever.
    refused(m, lambda: m.write(STATE % 32, "offline"), errno.EINTR)
    m.free_pages(pfn)
    m.write(STATE % 32, "offline")
    m.validate()


@pytest.mark.parametrize(("block", "why"), [(0, "several zones"), (7, "memory holes")])
def test_boot_blocks_that_cannot_go(m: Machine, block: int, why: str) -> None:
    with pytest.raises(KernelError, match=why) as e:
        m.write(STATE % block, "offline")
    assert e.value.errno == errno.EINVAL
    m.validate()


def test_offlining_a_nodes_last_block_stops_its_daemons(m: Machine) -> None:
    add(m)
    m.write(STATE % 32, "online_movable")
    assert {"kswapd1", "kcompactd1"} <= m.kthreads
    assert m.read("/sys/devices/system/node/has_normal_memory") == "0\n"
    m.log.clear()
    m.write(STATE % 32, "offline")
    assert not {"kswapd1", "kcompactd1"} & m.kthreads
    assert m.log[0] == "Fallback order for Node 0: 0 1 "
    assert m.read("/sys/devices/system/node/online") == "0-1\n"
    m.validate()


# -- removing ---------------------------------------------------------------------------


def test_remove_takes_blocks_sections_resource_and_node(m: Machine) -> None:
    before = dump(m)
    add(m)
    mh.remove_memory(m, DIMM, 4 * BLOCK)
    drain_all_pages(m)
    changed = [d for d in differences(before, dump(m)) if "/zones/" not in d]
    # A zone that lent pages got them back, in another order perhaps.
    changed = [d for d in changed if "/records/" not in d and "/totals" not in d]
    assert changed == ["/firmware_map/next: 9 -> 10"]  # its numbers are never used twice
    assert m.uevents[-1] == "remove /devices/system/node/node1 node"
    m.validate()


def test_remove_of_an_online_block_is_ebusy(m: Machine) -> None:
    add(m)
    m.write(STATE % 34, "online_movable")
    refused(m, lambda: mh.remove_memory(m, DIMM, 4 * BLOCK), errno.EBUSY)
    assert m.log[-1] == (
        "removing memory fails, because memory [0x0000000110000000-0x0000000117ffffff] is onlined"
    )
    with pytest.raises(ImpossibleState, match="__remove_memory"):
        mh.__remove_memory(m, DIMM, 4 * BLOCK)


def test_remove_of_a_part_splits_the_resource(m: Machine) -> None:
    add(m)
    mh.remove_memory(m, DIMM + BLOCK, BLOCK)
    text = iomem_show(m.iomem_resource)
    assert "100000000-107ffffff : System RAM" in text
    assert "110000000-11fffffff : System RAM" in text
    mh.remove_memory(m, DIMM, BLOCK)
    mh.remove_memory(m, DIMM + 3 * BLOCK, BLOCK)
    assert "110000000-117ffffff : System RAM" in iomem_show(m.iomem_resource)
    m.validate()


def test_blocks_with_their_own_memmap_are_removed_one_by_one() -> None:
    m = two_nodes("memory_hotplug.memmap_on_memory=1")
    m.plug("a", 1, DIMM, BLOCK)
    m.plug("b", 1, DIMM + BLOCK, BLOCK)
    refused(m, lambda: mh.remove_memory(m, DIMM, 2 * BLOCK), errno.EINVAL)
    assert m.log[-1] == "Refuse to remove 0x100000000 - 0x110000000,wrong granularity"


def test_offline_and_remove_is_all_or_nothing(m: Machine) -> None:
    add(m)
    m.write(STATE % 32, "online_movable")
    m.write(STATE % 33, "online_kernel")
    pfn = m.alloc_pages(nid=1)
    m.nodes[1].zone(2).drain()
    with pytest.raises(KernelError):
        mh.offline_and_remove_memory(m, DIMM, 4 * BLOCK)
    assert m.memory_blocks[32].zone is m.nodes[1].zone(3)
    m.validate()
    m.free_pages(pfn)
    mh.offline_and_remove_memory(m, DIMM, 4 * BLOCK)
    assert m.nodes[1].node_spanned_pages == 0
    m.validate()


def test_driver_managed_memory_is_named_after_its_driver(m: Machine) -> None:
    refused(m, lambda: mh.add_memory_driver_managed(m, 1, DIMM, BLOCK, "kmem"), errno.EINVAL)
    mh.add_memory_driver_managed(m, 1, DIMM, BLOCK, "System RAM (kmem)")
    assert "System RAM (kmem)" in iomem_show(m.iomem_resource)
    assert all(kind == "System RAM" or kind == "Reserved" for _, _, kind in m.firmware_map.values())
    mh.remove_memory(m, DIMM, BLOCK)
    m.validate()


def test_merging_makes_one_resource_of_neighbours(m: Machine) -> None:
    for i in range(3):
        mh.add_memory(m, 1, DIMM + i * BLOCK, BLOCK, mh.MHP_MERGE_RESOURCE)
    assert "100000000-117ffffff : System RAM" in iomem_show(m.iomem_resource)
    m.validate()


def test_auto_online_failure_leaves_the_memory_added(m: Machine) -> None:
    m.write("/sys/devices/system/memory/auto_online_blocks", "online_movable")
    veto(m, "MEM_GOING_ONLINE", -errno.EBUSY)
    assert m.plug("a", 1, DIMM, 2 * BLOCK) == 0
    assert m.read(STATE % 32) == "offline\n"
    m.validate()


def test_max_pfn_and_the_policy_zone_never_fall(m: Machine) -> None:
    add(m)
    m.write(STATE % 32, "online_kernel")
    assert (m.max_pfn, m.policy_zone) == (0x120000, 2)
    mh.offline_and_remove_memory(m, DIMM, 4 * BLOCK)
    assert (m.max_pfn, m.policy_zone) == (0x120000, 2)
    assert m.log[-1] == "Policy zone: Normal"
    m.validate()


@pytest.mark.parametrize(
    "event", ["MEM_ONLINE", "MEM_OFFLINE", "MEM_CANCEL_ONLINE", "MEM_CANCEL_OFFLINE"]
)
def test_a_refusal_that_comes_too_late_is_dropped(m: Machine, event: str) -> None:
    """Only the two GOING events can be vetoed; the first refusal's errno is the writer's."""
    add(m)
    if "CANCEL" not in event:
        veto(m, event, -errno.EPERM)
        m.write(STATE % 32, "online_movable")
        assert m.read(STATE % 32) == "online\n"
        m.validate()
        m.write(STATE % 32, "offline")
        assert m.read(STATE % 32) == "offline\n"
        m.validate()
        return
    if event == "MEM_CANCEL_OFFLINE":
        m.write(STATE % 32, "online_movable")
    veto(m, event, -errno.EPERM)
    veto(m, event.replace("CANCEL", "GOING"), -errno.ENOMEM)
    word = "online_movable" if event == "MEM_CANCEL_ONLINE" else "offline"
    refused(m, lambda: m.write(STATE % 32, word), errno.ENOMEM)
    assert m.swallowed[-1][0] == event
    assert m.swallowed[-1][1].__traceback__ is None  # which would keep the chain's frames


def test_offline_and_remove_reports_the_first_error_even_if_the_undo_is_refused(
    m: Machine,
) -> None:
    add(m)
    m.write(STATE % 32, "online_movable")
    m.write(STATE % 33, "online_kernel")
    m.alloc_pages(nid=1)
    veto(m, "MEM_GOING_ONLINE", -errno.EPERM)
    with pytest.raises(KernelError) as e:
        mh.offline_and_remove_memory(m, DIMM, 4 * BLOCK)
    assert e.value.errno == errno.EBUSY
    assert m.read(STATE % 32) == "offline\n"
    m.validate()


def test_one_block_with_its_own_memmap_among_others_is_enough_to_refuse() -> None:
    """A DIMM of one block holds its memmap, the one behind it, of two blocks, does not."""
    m = two_nodes("memhp_default_state=offline memory_hotplug.memmap_on_memory=1")
    m.plug("a", 1, DIMM, BLOCK)
    m.plug("b", 1, DIMM + BLOCK, 2 * BLOCK)
    assert m.memory_blocks[32].nr_vmemmap_pages and not m.memory_blocks[34].nr_vmemmap_pages
    refused(m, lambda: mh.remove_memory(m, DIMM, 3 * BLOCK), errno.EINVAL)
    assert m.log[-1] == "Refuse to remove 0x100000000 - 0x118000000,wrong granularity"


def test_a_range_of_two_resources_leaves_their_lines(m: Machine) -> None:
    """Two adds, one removal over both: no resource holds the range, so both lines stay.

    Expect nothing to be added there before each line was removed by itself.
    """
    mh.add_memory(m, 1, DIMM, BLOCK)
    mh.add_memory(m, 1, DIMM + BLOCK, 2 * BLOCK)
    mh.remove_memory(m, DIMM, 3 * BLOCK)
    lines = ["100000000-107ffffff : System RAM", "108000000-117ffffff : System RAM"]
    assert [x for x in iomem_show(m.iomem_resource).splitlines() if x in lines] == lines
    assert 32 not in m.memory_blocks and m.n_online == {0}
    m.validate()
    refused(m, lambda: mh.add_memory(m, 1, DIMM, BLOCK), errno.EEXIST)
    mh.remove_memory(m, DIMM + BLOCK, 2 * BLOCK)
    refused(m, lambda: mh.add_memory(m, 1, DIMM, 2 * BLOCK), errno.EEXIST)
    mh.remove_memory(m, DIMM, BLOCK)
    m.validate()
    mh.add_memory(m, 1, DIMM, 3 * BLOCK)
    mh.remove_memory(m, DIMM, 3 * BLOCK)
    assert not any(x in iomem_show(m.iomem_resource) for x in lines)
    m.validate()


def test_a_dimm_over_probed_memory_takes_the_block_and_leaves_the_line(m: Machine) -> None:
    """A user adds the DIMM's first block by hand: for ACPI it is there already."""
    m.write("/sys/devices/system/memory/probe", f"{DIMM:#x}")
    m.plug("a", 1, DIMM, 2 * BLOCK)
    assert 33 not in m.memory_blocks
    assert m.unplug("a") == 0
    assert 32 not in m.memory_blocks
    assert "100000000-107ffffff : System RAM" in iomem_show(m.iomem_resource)
    assert m.log[-1] == "section already deactivated (0x108000 + 32768)"
    m.validate()
    with pytest.raises(KernelError) as e:
        m.write("/sys/devices/system/memory/probe", f"{DIMM:#x}")
    assert e.value.errno == errno.EEXIST
    m.validate()


def test_a_misaligned_dimm_over_probed_memory_stops_the_kernel_when_it_leaves(m: Machine) -> None:
    """It overlaps, which is found before its size is looked at; the removal does look (BUG_ON)."""
    m.write("/sys/devices/system/memory/probe", f"{DIMM:#x}")
    assert m.plug("a", 1, DIMM, BLOCK + (2 << 20)) == 0
    m.validate()
    with pytest.raises(ImpossibleState, match="try_remove_memory"):
        m.unplug("a")
    assert m.log[-1].startswith("Block size [0x8000000] unaligned hotplug range")


@pytest.mark.parametrize(
    ("nid", "pfn", "nr_pages", "code", "words"),
    [
        (9, DIMM >> 12, 512, errno.EINVAL, "nid: 9; allowed: a number from 0 to 1"),
        (1, 1 << 40, 512, errno.ERANGE, "are beyond"),
        (1, -512, 512, errno.EINVAL, "pfn: -512"),
        (1, DIMM >> 12, "x", errno.EINVAL, "nr_pages: 'x'"),
    ],
)
def test_add_pages_of_what_is_not_there(m, nid, pfn, nr_pages, code: int, words: str) -> None:
    with pytest.raises(KernelError, match=words):
        mh.__add_pages(m, nid, pfn, nr_pages)
    refused(m, lambda: mh.__add_pages(m, nid, pfn, nr_pages), code)


def free_pages(m: Machine) -> int:
    return sum(z.nr_free_pages + z.pcp_pages() for z in m.all_zones())


def test_less_than_a_section_has_a_memmap_of_base_pages(m: Machine) -> None:
    """Subsections 0, 2 and 3 of a section come and go: 8 pages each, and one page table.

    Expect the large page of a whole section to stay until its last subsection has gone.
    """
    pfn, free = DIMM >> 12, free_pages(m)
    before = dump(m)
    mh.__add_pages(m, 0, pfn, 512)
    assert free_pages(m) == free - (8 + 1)
    mh.__add_pages(m, 0, pfn + 1024, 1024)
    assert free_pages(m) == free - (24 + 1)
    with pytest.raises(KernelError) as e:
        mh.__add_pages(m, 0, pfn + 512, 1024)
    assert e.value.errno == errno.EEXIST
    mh.__remove_pages(m, pfn, 512)
    assert free_pages(m) == free - (16 + 1)
    mh.__remove_pages(m, pfn + 1024, 1024)
    assert free_pages(m) == free
    mh.__add_pages(m, 0, pfn, 32768)
    assert free_pages(m) == free - 512
    mh.__remove_pages(m, pfn, 512)
    assert free_pages(m) == free - 512
    mh.__remove_pages(m, pfn + 512, 32768 - 512)
    assert free_pages(m) == free
    after = dump(m)
    assert before["vmemmap"] == after["vmemmap"]
    m.validate()


@pytest.mark.parametrize("nth", [1, 2, 5, 9])
def test_a_shortage_in_the_middle_of_base_pages_gives_all_back(m: Machine, nth: int) -> None:
    before = dump(m)
    m.trace(recording=False).fail("__alloc_pages", errno.ENOMEM, nth)
    with pytest.raises(OutOfMemory):
        mh.__add_pages(m, 0, DIMM >> 12, 512)
    m.kprobes = None
    assert differences(before, dump(m)) == []
    m.validate()


def test_a_hole_in_a_boot_section_takes_pages_and_has_a_memmap_already() -> None:
    """64 MiB of RAM behind the last whole section; the other half of its section is a hole."""
    m = two_nodes(memory="1088M", nodes=[{"cpus": "0-1", "memory": "1088M"}, {}])
    pfn, free = (1088 << 20) >> 12, free_pages(m)
    with pytest.raises(KernelError) as e:
        mh.__add_pages(m, 0, pfn - 512, 1024)
    assert e.value.errno == errno.EEXIST
    mh.__add_pages(m, 0, pfn, 1024)
    assert free_pages(m) == free
    with pytest.raises(KernelError) as e:
        mh.__add_pages(m, 0, pfn + 512, 512)
    assert e.value.errno == errno.EEXIST
    m.validate()
    mh.__remove_pages(m, pfn, 1024)
    assert free_pages(m) == free
    m.validate()


def test_a_refusal_that_ends_the_chain_leaves_the_cpuset_as_it_was(m: Machine) -> None:
    """Priority 100 refuses MEM_OFFLINE; the cpuset, at 10, hears of it with the next event."""
    add(m)
    m.write(STATE % 32, "online_movable")

    def refuse(m: Machine, act: int, arg: MemoryNotify) -> int:
        return -errno.EPERM if ACTION_NAMES[act] == "MEM_OFFLINE" else 0

    notifier = MemoryNotifier("refuse", refuse, 100)
    register_memory_notifier(m, notifier)
    m.write(STATE % 32, "offline")
    assert (m.n_memory, m.top_cpuset_mems) == ({0}, {0, 1})
    m.validate()
    unregister_memory_notifier(m, notifier)
    m.write(STATE % 3, "offline")
    assert m.top_cpuset_mems == {0}
    m.validate()


def test_a_range_of_two_nodes_takes_the_last_blocks_node_away() -> None:
    """Nodes 1 and 2 get a block each, which leave together: node 1 is empty, and stays online.

    Expect it to go when memory of it goes the next time.
    """
    m = two_nodes(nodes=[{"cpus": "0-1", "memory": "1G"}, {}, {}], srat="full")
    mh.add_memory(m, 1, DIMM, BLOCK)
    mh.add_memory(m, 2, DIMM + BLOCK, BLOCK)
    mh.remove_memory(m, DIMM, 2 * BLOCK)
    assert m.read("/sys/devices/system/node/online") == "0-1\n"
    assert m.uevents[-1] == "remove /devices/system/node/node2 node"
    m.validate()
    mh.add_memory(m, 1, DIMM + 2 * BLOCK, BLOCK)
    m.validate()
    mh.remove_memory(m, DIMM + 2 * BLOCK, BLOCK)
    assert m.read("/sys/devices/system/node/online") == "0\n"
    m.validate()
