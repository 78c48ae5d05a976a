"""Page records against their readable twins: spans, flags, pageblock types, the journal."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kmm import GFP_HIGHUSER_MOVABLE, GFP_KERNEL, Machine
from kmm._memmap import MemMap, page_dtype, pageblock_dtype, section_dtype
from tests.conftest import DIMM, two_nodes
from tests.reference.memmap_twin import first_page, last_page, page_flags

STATE = "/sys/devices/system/memory/memory%d/state"
START, BLOCK = DIMM >> 12, 32768
WORDS = st.lists(
    st.sampled_from(["offline", "online_kernel", "online_movable"]), min_size=6, max_size=6
)
SLOW = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


def plugged(words: list[str], cmdline: str = "") -> Machine:
    m = two_nodes(cmdline)
    for i, word in enumerate(words):
        m.plug(f"d{i}", 1, DIMM + (i << 27), 128 << 20)
        if word != "offline":
            m.write(STATE % (32 + i), word)
    return m


@SLOW
@given(words=WORDS)
def test_span_searches_agree_with_a_walk(words: list[str]) -> None:
    m = plugged(words)
    end = START + 6 * BLOCK
    for zone in m.nodes[1].zones:
        search = m.memmap_engine.shrink_search
        for at in range(START, end, BLOCK):
            assert search(at, end, zone.index, True) == first_page(m, zone, at, end)
            last = at + BLOCK - 1
            assert search(START, last, zone.index, False) == last_page(m, zone, START, last)
    m.validate()


@SLOW
@given(words=WORDS, seed=st.integers(0, 999), mmom=st.booleans())
def test_page_flags_agree_with_the_free_lists(words: list[str], seed: int, mmom: bool) -> None:
    m = plugged(words, f"memory_hotplug.memmap_on_memory={int(mmom)}")
    rng = np.random.default_rng(seed)
    for gfp in (GFP_KERNEL, GFP_HIGHUSER_MOVABLE):
        for order in (0, 2, 9, 10):
            pfns = m.alloc_pages_bulk(int(rng.integers(1, 40)), order, gfp, 1)
            m.free_pages_bulk(pfns[:: int(rng.integers(1, 4))], order)
    start, count = START + int(rng.integers(0, 2000)), 5 * BLOCK
    have = m.kpageflags(start, count).tolist()
    assert have == page_flags(m, m.nodes[1].zones, start, count)
    m.validate()


def test_flags_beyond_memory_are_nopage(m: Machine) -> None:
    assert set(m.kpageflags(START, 1000).tolist()) == {1 << 20}
    assert set(m.kpageflags((1 << 34) - 10, 10).tolist()) == {1 << 20}
    assert m.kpageflags(0x50, 1).tolist() == [1 << 32]
    m.validate()


def test_pageblock_types_are_four_bits_each(m: Machine) -> None:
    m.plug("a", 1, DIMM, 128 << 20)
    engine = m.memmap_engine
    for i in range(64):
        engine.set_pageblock_migratetype(START + i * 512, i % 5)
    assert [engine.get_pageblock_migratetype(START + i * 512) for i in range(64)] == [
        i % 5 for i in range(64)
    ]
    assert int(m.sections["pageblock_flags"][32][0]) & 0xFFFFF == 0x43210
    engine.grouping_disabled = True
    engine.set_pageblock_migratetype(START, 1)
    assert engine.get_pageblock_migratetype(START) == 0


def test_the_journal_puts_records_back(m: Machine) -> None:
    m.plug("a", 1, DIMM, 128 << 20)
    m.write(STATE % 32, "online_kernel")
    zone = m.nodes[1].zone(2)
    lists = [zone.free_list(o, mt) for o in range(11) for mt in range(5)]
    saved, page = zone.save(), m.memmap[START : START + 2048].tobytes()
    m.memmap_engine.begin_journal()
    for order in (0, 0, 3, 9, 10):
        zone.rmqueue(order, 0)
    assert zone.free_list(10, 1) != lists[10 * 5 + 1]
    m.memmap_engine.end_journal(True)
    zone.restore(saved)
    assert [zone.free_list(o, mt) for o in range(11) for mt in range(5)] == lists
    assert m.memmap[START : START + 2048].tobytes() == page
    m.validate()


def test_records_have_the_sizes_that_the_design_promises() -> None:
    sizes = (page_dtype.itemsize, pageblock_dtype.itemsize, section_dtype.itemsize)
    assert sizes == (16, 16, 64)


def test_buffers_that_do_not_fit_are_refused() -> None:
    pages = np.zeros(32768, page_dtype)
    blocks, sections = np.zeros(64, pageblock_dtype), np.zeros(1, section_dtype)
    MemMap(pages, blocks, sections, 5)
    with pytest.raises(ValueError, match="different numbers of pages"):
        MemMap(pages, blocks[:32], sections, 5)
    with pytest.raises(ValueError, match="empty buffer"):
        MemMap(pages[:0], blocks, sections, 5)
    with pytest.raises(ValueError, match=r"mismatch|Expected"):
        MemMap(np.zeros(32768, np.uint64), blocks, sections, 5)
