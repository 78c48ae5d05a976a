"""The rules about who gets which page."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from kmm import GFP_HIGHUSER_MOVABLE, GFP_KERNEL, KernelError, Machine
from kmm.mmzone import Zone
from tests.conftest import DIMM, two_nodes

START = DIMM >> 12


def kernel_zone(blocks: int = 3) -> tuple[Machine, Zone]:
    m = two_nodes("memhp_default_state=online_kernel")
    m.plug("a", 1, DIMM, blocks << 27)
    return m, m.nodes[1].zone(2)


def test_onlined_blocks_are_listed_by_address() -> None:
    m, zone = kernel_zone()
    assert zone.free_list(10, 1) == list(range(START, START + 3 * 32768, 1024))
    m.validate()


def test_pages_of_a_fresh_block_come_upward_and_other_types_claim_other_blocks() -> None:
    """The order that a real kernel showed: unmovable from 0x100000, movable from 0x100400,
    reclaimable from 0x100800, two pageblocks each."""
    m, zone = kernel_zone()
    assert m.alloc_pages_bulk(31, 0, GFP_KERNEL, 1).tolist() == list(range(0x100000, 0x10001F))
    assert m.alloc_pages(0, GFP_HIGHUSER_MOVABLE, 1) == 0x100400
    assert m.alloc_pages(0, GFP_KERNEL | 0x10, 1) == 0x100800
    counts = [m.memmap_engine.get_pageblock_migratetype(0x100000 + i * 512) for i in range(8)]
    assert counts == [0, 0, 1, 1, 2, 2, 1, 1]
    assert zone.managed_pages == 98304
    m.validate()


def test_lists_that_there_are_not_cannot_be_looked_at() -> None:
    _m, zone = kernel_zone(1)
    for name, view in (
        ("order", lambda: zone.free_list(11, 0)),
        ("mt", lambda: zone.free_list(0, 5)),
        ("cpu", lambda: zone.pcp_list(2, 0)),
        ("pindex", lambda: zone.pcp_list(0, -1)),
        ("cpu", lambda: zone.pcp_state(-1)),
    ):
        with pytest.raises(ValueError, match=f"{name}: "):
            view()


def test_one_request_takes_a_batch_out_of_the_free_count() -> None:
    m, zone = kernel_zone(1)
    assert zone.pageset_batch == 7
    m.alloc_pages(nid=1)
    assert zone.nr_free_pages == 32768 - 7
    zone.drain()
    assert zone.nr_free_pages == 32768 - 1
    m.validate()


def test_an_order_9_request_parks_a_second_block() -> None:
    m, zone = kernel_zone()
    m.alloc_pages(9, GFP_KERNEL, 1)
    assert zone.pcp_pages() == 512
    assert set(m.kpageflags(START, 1024).tolist()) == {0}
    m.validate()


def test_freed_pages_merge_back_whole() -> None:
    m, zone = kernel_zone()
    pfns = m.alloc_pages_bulk(5000, 0, GFP_KERNEL, 1)
    rng = np.random.default_rng(1)
    m.free_pages_bulk(rng.permutation(pfns))
    zone.drain()
    assert zone.nr_free()[:10] == [0] * 10
    assert zone.nr_free()[10] == 96
    m.validate()


@pytest.mark.parametrize(
    ("pfn", "order", "code"),
    [
        (START + 0, 1, errno.EINVAL),  # another order
        (START + 5, 0, errno.EEXIST),  # on a per-CPU list
        (START + 9000, 0, errno.EEXIST),  # free
        (START + 1, 1, errno.EINVAL),  # misaligned
        (1 << 30, 0, errno.EFAULT),  # nothing there
        (1 << 40, 0, errno.EFAULT),  # beyond the address space
    ],
)
def test_misuse_of_free_is_named_and_changes_nothing(pfn: int, order: int, code: int) -> None:
    m, _zone = kernel_zone()
    good = m.alloc_pages(nid=1)
    assert good == START
    for act in (
        lambda: m.free_pages(pfn, order),
        lambda: m.free_pages_bulk([good, pfn] if order == 0 else [pfn], order),
    ):
        with pytest.raises(KernelError) as e:
            act()
        assert e.value.errno == code
        assert hex(pfn) in str(e.value)
    m.validate()
    m.free_pages(good)
    with pytest.raises(KernelError):
        m.free_pages(good)
    m.validate()


def test_a_part_of_a_block_cannot_be_freed() -> None:
    m, _ = kernel_zone()
    pfn = m.alloc_pages(4, GFP_KERNEL, 1)
    with pytest.raises(KernelError):
        m.free_pages(pfn + 1, 0)
    m.free_pages(pfn, 4)
    m.validate()


def test_bulk_allocation_takes_what_there_is_and_fills_out() -> None:
    m, _zone = kernel_zone(1)
    out = np.zeros(100_000, dtype=np.uint64)
    m.write("/proc/sys/vm/min_free_kbytes", "0")
    got = m.alloc_pages_bulk(100_000, 0, GFP_KERNEL | 0x200000, 1, out=out)
    assert np.shares_memory(got, out)
    assert 32000 < len(got) <= 32768
    assert len(set(got.tolist())) == len(got)
    m.free_pages_bulk(got)
    m.validate()


def test_a_bulk_request_finds_what_lies_on_per_cpu_lists() -> None:
    m = two_nodes()
    m.alloc_pages_bulk(1 << 20)
    with pytest.raises(KernelError):
        while True:
            m.alloc_pages()
    assert len(m.alloc_pages_bulk(10)) == 0
    m.validate()


def test_the_engine_refuses_requests_out_of_range() -> None:
    _, zone = kernel_zone(1)
    for order, mt, cpu in ((11, 0, 0), (-1, 0, 0), (0, 3, 0), (0, 0, 2)):
        with pytest.raises(ValueError, match="out of range"):
            zone.rmqueue(order, mt, 0, cpu)
