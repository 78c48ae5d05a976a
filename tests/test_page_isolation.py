"""The call chain of an isolation that a page in use stops, and what it leaves."""

from __future__ import annotations

import pytest

from kmm import KernelError, Machine
from kmm.params import PAGEBLOCK_NR_PAGES
from tests.conftest import DIMM

STATE = "/sys/devices/system/memory/memory32/state"
START, NR_BLOCKS = DIMM >> 12, 64


def refused_offline(m: Machine, pageblock: int) -> list[list[object]]:
    """Let the kernel hold a page of one pageblock; return the calls of the failing offline."""
    m.plug("a", 1, DIMM, 256 << 20)
    for state in (STATE, STATE.replace("32", "33")):
        m.write(state, "online_kernel")
    # The whole block is taken, with the second one above the watermarks, to keep one pageblock.
    pfns = m.alloc_pages_bulk(NR_BLOCKS, order=9, nid=1)
    wanted = START + pageblock * PAGEBLOCK_NR_PAGES
    for pfn in pfns.tolist():
        if pfn != wanted:
            m.free_pages(pfn, order=9)
    m.nodes[1].zone(2).drain()
    assert wanted in pfns
    probes = m.trace()
    with pytest.raises(KernelError) as error:
        m.write(STATE, "offline")
    m.kprobes = None
    assert error.value.errno == 16
    m.validate()
    assert m.nodes[1].zone(2).nr_isolate_pageblock == 0
    return probes.calls


def isolation(calls: list[list[object]]) -> list[list[object]]:
    """The calls below start_isolate_page_range, depths counted from there."""
    first = next(i for i, c in enumerate(calls) if c[1] == "start_isolate_page_range")
    base = int(str(calls[first][0]))
    out: list[list[object]] = []
    for depth, name, times in calls[first + 1 :]:
        if int(str(depth)) <= base:
            break
        if name != "dump_page":
            out.append([int(str(depth)) - base, name, times])
    return out


def test_the_first_pageblock_refuses(m: Machine) -> None:
    assert isolation(refused_offline(m, 0)) == [[1, "isolate_single_pageblock", 1]]


def test_the_last_pageblock_refuses(m: Machine) -> None:
    assert isolation(refused_offline(m, NR_BLOCKS - 1)) == [
        [1, "isolate_single_pageblock", 2],
        [1, "unset_migratetype_isolate", 1],
    ]


@pytest.mark.parametrize("pageblock", [1, 2, 33, NR_BLOCKS - 2])
def test_a_pageblock_in_the_middle_refuses(m: Machine, pageblock: int) -> None:
    assert isolation(refused_offline(m, pageblock)) == [
        [1, "isolate_single_pageblock", 2],
        [1, "undo_isolate_page_range", 1],
        [2, "unset_migratetype_isolate", pageblock],
        [1, "unset_migratetype_isolate", 1],
    ]


def test_nothing_refuses(m: Machine) -> None:
    m.plug("a", 1, DIMM, 128 << 20)
    m.write(STATE, "online_kernel")
    probes = m.trace()
    m.write(STATE, "offline")
    assert isolation(probes.calls) == [[1, "isolate_single_pageblock", 2]]
    m.validate()
