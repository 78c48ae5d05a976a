"""What boot makes of RAM, and that a machine of many terabytes costs few steps of Python."""

from __future__ import annotations

import cProfile
import pstats
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from kmm import Machine, MachineConfig
from kmm.mm_init import mark_used
from kmm.params import FILL_RESERVED, PAGES_PER_SECTION
from kmm.sparse import (
    PMDS_PER_TABLE,
    VMEMMAP_NOT_OURS,
    subsection_mask,
    vmemmap_chunks,
    vmemmap_users_of,
)
from kmm.validate import check_sections, check_vmemmap
from kmm.validate_zone import check_free_lists
from kmm.views import layers


@pytest.mark.parametrize("page_size", [56, 64])
@pytest.mark.parametrize("memory", [(1 << 30) - (2 << 20), (5 << 30) + (6 << 20)])
def test_sections_at_boot_are_those_of_ram_and_their_memmap_is_whole(
    memory: int, page_size: int
) -> None:
    """Counted section by section here, in arrays there."""
    m = Machine(MachineConfig.from_dict({"memory": memory, "struct_page_size": page_size}))
    maps: Counter[int] = Counter()
    for zone in m.all_zones():
        for start, end in zone.early_ranges:
            for section in range(start // PAGES_PER_SECTION, -(-end // PAGES_PER_SECTION)):
                first = section * PAGES_PER_SECTION
                at, stop = max(start, first), min(end, first + PAGES_PER_SECTION)
                maps[section] |= subsection_mask(at, stop - at)
    users: Counter[int] = Counter()
    for section in maps:
        first = section * PAGES_PER_SECTION
        for chunk in vmemmap_chunks(m, first, PAGES_PER_SECTION):
            users[chunk] += vmemmap_users_of(m, chunk, first, PAGES_PER_SECTION)
    have = m.sections["flags"].nonzero()[0].tolist()
    assert {s: int(m.sections["subsection_map"][s]) for s in have} == dict(maps)
    backed = m.vmemmap_users.nonzero()[0].tolist()
    assert {c: int(m.vmemmap_users[c]) for c in backed} == dict(users)
    assert all(int(m.vmemmap_pfn[c]) == VMEMMAP_NOT_OURS for c in backed)
    tables = Counter(c // PMDS_PER_TABLE for c in users)
    assert {t: n for t, (_, n) in m.vmemmap_tables.items()} == dict(tables)
    m.validate()


@pytest.mark.parametrize(("start", "end"), [(600, 700), (600, 1024), (512, 1600), (600, 2000)])
def test_pages_used_at_boot_are_marked_by_pageblock_and_by_page(start: int, end: int) -> None:
    m = Machine()
    first = 0x10000
    assert m.kpageflags(first, 2048).tolist() == [1 << 10] * 2048
    m.nodes[0].zone(1).offline_isolated_pages(first, first + 2048)
    mark_used(m, first + start, first + end, FILL_RESERVED)
    words = m.kpageflags(first, 2048)
    assert [int(w) >> 32 & 1 for w in words] == [int(start <= i < end) for i in range(2048)]


def calls(act: Callable[[], Any]) -> int:
    """How many functions Python calls while something is done."""
    profile = cProfile.Profile()
    profile.runcall(act)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def test_sixteen_terabytes_cost_few_steps_of_python() -> None:
    """131,072 sections, 8,192 blocks and four million free blocks, none of them one by one."""
    config = MachineConfig.from_dict({"memory": "16T", "maxmem": "16T", "slots": 0})
    made: list[Machine] = []
    assert calls(lambda: made.append(Machine(config))) < 100_000
    m = made[0]
    assert calls(lambda: check_sections(m)) < 20_000
    assert calls(lambda: check_vmemmap(m)) < 1_000
    assert calls(lambda: layers(m)) < 100_000
    zone = m.nodes[0].zone(2)
    assert calls(lambda: check_free_lists(m, zone, "zone")) < 10_000
