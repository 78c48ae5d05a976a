"""Retiring pages: errnos, log lines and what HardwareCorrupted counts."""

from __future__ import annotations

import errno
import re

import pytest

from kmm import GFP_HIGHUSER_MOVABLE, KernelError, Machine
from kmm.errors import EHWPOISON, kernel_error
from kmm.page_alloc import allocator_undo, drain_all_pages
from kmm.params import KPF_HWPOISON, KPF_RESERVED, PG_TAKEN
from kmm.snapshot import differences, dump
from tests.conftest import DIMM, two_nodes

MEMORY = "/sys/devices/system/memory"
BLOCK = 128 << 20
PFN = DIMM >> 12


@pytest.fixture
def online() -> Machine:
    m = two_nodes("memhp_default_state=online_movable")
    m.plug("a", 1, DIMM, 2 * BLOCK)
    return m


def soft(m: Machine, pfn: int) -> None:
    m.write(f"{MEMORY}/soft_offline_page", hex(pfn << 12))


def hard(m: Machine, pfn: int) -> None:
    m.write(f"{MEMORY}/hard_offline_page", hex(pfn << 12))


def refused(act, m: Machine, pfn: int) -> int:
    with pytest.raises(KernelError) as e:
        act(m, pfn)
    return e.value.errno or 0


def corrupted(m: Machine) -> int:
    """HardwareCorrupted of /proc/meminfo, pages."""
    found = re.search(r"HardwareCorrupted: +(\d+) kB", m.read("/proc/meminfo"))
    assert found is not None
    return int(found[1]) // 4


def word(m: Machine, pfn: int) -> int:
    return int(m.kpageflags(pfn, 1)[0])


def test_free_pages_are_taken_and_counted(online: Machine) -> None:
    free = online.nodes[1].zone(3).nr_free_pages
    soft(online, PFN + 5)
    hard(online, PFN + 9)
    assert online.nodes[1].zone(3).nr_free_pages == free - 2
    assert corrupted(online) == 2
    assert online.log[-1] == (
        f"Memory failure: {PFN + 9:#x}: recovery action for free buddy page: Recovered"
    )
    online.validate()


@pytest.mark.parametrize("first", [soft, hard])
def test_a_page_is_poisoned_once(online: Machine, first) -> None:
    first(online, PFN + 5)
    before = dump(online)
    soft(online, PFN + 5)
    assert online.log[-1] == f"soft_offline_page: {PFN + 5:#x} page already poisoned"
    assert refused(hard, online, PFN + 5) == EHWPOISON
    assert online.log[-1] == f"Memory failure: {PFN + 5:#x}: already hardware poisoned"
    assert corrupted(online) == 1
    assert differences(before, dump(online)) == []
    online.validate()


def test_the_errno_has_its_name(online: Machine) -> None:
    hard(online, PFN)
    with pytest.raises(KernelError, match="EHWPOISON"):
        hard(online, PFN)


def test_a_page_parked_on_a_per_cpu_list_is_free(online: Machine) -> None:
    for act in (soft, hard):
        pfn = online.alloc_pages(0, 0x100CCA, 1)
        online.free_pages(pfn)
        assert online.nodes[1].zone(3).pcp_pages()
        act(online, pfn)
        assert word(online, pfn) == KPF_HWPOISON
        online.validate()
    assert corrupted(online) == 2


def test_a_page_in_use_is_marked_only_by_a_hard_failure(online: Machine) -> None:
    pfn = online.alloc_pages(0, 0x100CCA, 1)
    assert refused(soft, online, pfn) == errno.EIO
    assert online.log[-1] == f"Memory failure: {pfn:#x}: unhandlable page."
    assert corrupted(online) == 0
    assert refused(hard, online, pfn) == errno.EBUSY
    assert online.log[-2:] == [
        f"Memory failure: {pfn:#x}: unhandlable page.",
        f"Memory failure: {pfn:#x}: recovery action for unknown page: Ignored",
    ]
    assert corrupted(online) == 1
    assert online.memmap_engine.is_allocated(pfn, 0)
    assert refused(hard, online, pfn) == EHWPOISON
    online.validate()


def test_a_reserved_page_and_a_hole_keep_what_they_are(online: Machine) -> None:
    for pfn in (0x1000, 0xA0):
        was = word(online, pfn)
        assert refused(soft, online, pfn) == errno.EIO
        assert refused(hard, online, pfn) == errno.EBUSY
        assert word(online, pfn) == was | KPF_HWPOISON
    assert word(online, 0x1000) & KPF_RESERVED
    online.validate()


def test_a_block_onlined_again_loses_the_marks_and_the_count_stays(online: Machine) -> None:
    hard(online, PFN + 5)
    free = online.nodes[1].zone(3).nr_free_pages
    online.write(f"{MEMORY}/memory32/state", "offline")
    assert refused(soft, online, PFN + 5) == errno.EIO
    assert refused(hard, online, PFN + 5) == errno.ENXIO
    online.write(f"{MEMORY}/memory32/state", "online_movable")
    assert online.nodes[1].zone(3).nr_free_pages == free + 1
    assert corrupted(online) == 1
    soft(online, PFN + 5)
    assert corrupted(online) == 2
    online.validate()


def test_removing_marked_pages_lowers_the_count(online: Machine) -> None:
    for pfn in (PFN + 5, PFN + 7, PFN + 32768):
        hard(online, pfn)
    online.write(f"{MEMORY}/memory33/state", "offline")
    online.write(f"{MEMORY}/memory33/state", "online_movable")
    assert online.unplug("a") == 0
    assert corrupted(online) == 1
    online.plug("b", 1, DIMM, BLOCK)
    soft(online, PFN + 5)
    assert corrupted(online) == 2
    online.validate()


def test_memmap_of_its_own_block_is_in_use() -> None:
    m = two_nodes("memhp_default_state=online_movable memory_hotplug.memmap_on_memory=1")
    m.plug("a", 1, DIMM, BLOCK)
    was = word(m, PFN + 1)
    assert refused(soft, m, PFN) == errno.EIO
    assert refused(hard, m, PFN + 1) == errno.EBUSY
    assert word(m, PFN + 1) == was | KPF_HWPOISON
    assert m.unplug("a") == 0
    assert corrupted(m) == 0
    m.validate()


def test_a_marked_page_of_a_split_block_comes_back_to_nobody(online: Machine) -> None:
    first = online.alloc_pages(3, nid=0)
    for pfn in (first, first + 5):
        assert refused(hard, online, pfn) == errno.EBUSY
    online.split_page(first, 3)
    zone = online.page_zone(first)
    assert zone is not None
    freed = zone.vm_events["pgfree"]
    online.free_pages(online.alloc_pages(nid=0))
    for pfn in range(first, first + 8):
        online.free_pages(pfn)
    assert zone.vm_events["pgfree"] == freed + 1 + 6
    again = {online.alloc_pages(nid=0) for _ in range(20)}
    assert set(range(first, first + 8)) - again == {first, first + 5}
    online.validate()


def test_a_used_page_that_went_offline_with_a_mark_cannot_be_freed(online: Machine) -> None:
    pfn = online.alloc_pages(0, GFP_HIGHUSER_MOVABLE, nid=1)
    assert refused(hard, online, pfn) == errno.EBUSY
    online.write(f"{MEMORY}/memory32/state", "offline")
    for act in (online.free_pages, lambda p: online.free_pages_bulk([p])):
        with pytest.raises(KernelError) as e:
            act(pfn)
        assert e.value.errno == errno.EFAULT
    online.write(f"{MEMORY}/memory32/state", "online_movable")
    online.validate()


def test_the_host_keeps_the_record_of_a_marked_page_that_is_free(online: Machine) -> None:
    first = online.alloc_pages(9, nid=0)
    assert refused(hard, online, first + 5) == errno.EBUSY
    online.free_pages(first, 9)
    online._attach(online.memmap_engine, 0)
    drain_all_pages(online)
    assert online.memmap["flags"][first + 5]
    online.validate()


def test_a_block_of_two_types_is_broken_up_as_its_first_pageblock(online: Machine) -> None:
    first = PFN + 1024
    online.memmap_engine.set_pageblock_migratetype(first + 512, 2)
    soft(online, first + 600)
    assert first in online.nodes[1].zone(3).free_list(9, 1)
    assert first + 512 in online.nodes[1].zone(3).free_list(6, 1)
    online.validate()


@pytest.mark.parametrize(("order", "again"), [(3, 0), (3, 3), (4, 4), (6, 10), (9, 9), (10, 10)])
def test_a_block_with_a_marked_page_is_dropped_when_it_is_next_taken(
    online: Machine, order: int, again: int
) -> None:
    first = online.alloc_pages(order, nid=0)
    bad = first + (1 << order) - 1
    assert refused(hard, online, bad) == errno.EBUSY
    online.free_pages(first, order)
    drain_all_pages(online)
    online.validate()
    taken = online.alloc_pages_bulk(1 << 20, again, nid=0)
    assert len(taken)
    assert not ((taken <= bad) & (bad < taken + (1 << again))).any()
    # All that was taken with it is in nobody's hands.
    flags = online.memmap["flags"][bad >> again << again :][: 1 << again]
    assert (flags & PG_TAKEN).all()
    online.validate()
    online.free_pages_bulk(taken, again)
    online.validate()


def test_a_failed_chain_finds_a_dropped_block_free_again(online: Machine) -> None:
    first = online.alloc_pages(6, nid=0)
    assert refused(hard, online, first + 9) == errno.EBUSY
    online.free_pages(first, 6)
    before = dump(online)
    with pytest.raises(KernelError), allocator_undo(online):
        online.alloc_pages_bulk(1 << 20, nid=0)
        raise kernel_error(-errno.ENOMEM)
    assert not differences(before, dump(online))
    online.validate()


def test_a_marked_page_that_was_asked_for_by_address_comes_back_to_nobody(online: Machine) -> None:
    first = online.alloc_pages(6, nid=0)
    assert refused(hard, online, first + 9) == errno.EBUSY
    online.free_pages(first, 6)
    online.alloc_contig_range(first, first + 64)
    online.free_contig_range(first, 64)
    online.validate()
    assert first + 9 not in online.alloc_pages_bulk(1 << 20, nid=0)
    online.validate()
