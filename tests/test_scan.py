"""What keeps a range from being isolated, compared with a slow twin page by page."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kmm import _scan
from kmm._page_owner import pages_in_use
from tests.reference import isolation_twin as twin
from tests.test_offline_explain import DEEDS, USERS, Life


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["movable", "kernel"]), USERS, DEEDS, st.integers(0, 63), st.data())
def test_isolation_looks_as_the_twin_does(
    kind: str, users: Any, deeds: Any, pageblock: int, data: Any
) -> None:
    life = Life([kind], False)
    life.populate(users)
    for deed in deeds:
        life.do(*deed)
    m, start, end = life.m, 32 * 32768, 33 * 32768
    zone = m.page_zone(start)
    assert zone is not None
    zone.drain()
    found = twin.pages(m, start, end)
    room = np.zeros(40000, dtype=np.uint64)
    n = _scan.unmovable_pages(zone, start, end, room)
    first = twin.has_unmovable_pages(found, 0, 32768, kind == "movable", True)
    assert (int(room[0]) - start if n else -1) == first
    # Part of a pageblock, as alloc_contig_range asks for it.
    at = pageblock * 512 + data.draw(st.integers(0, 511))
    behind = data.draw(st.integers(at + 1, (pageblock + 1) * 512))
    blocked = _scan.start_isolate_page_range(zone, start + at, start + behind, False)
    want = twin.has_unmovable_pages(found, at, behind, kind == "movable", False)
    assert (blocked - start if blocked >= 0 else -1) == want
    if blocked < 0:
        here = pageblock * 512 + start
        _scan.undo_isolate_page_range(zone, here, here + 512, 1)
    m.validate()


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["movable", "kernel"]), USERS, DEEDS)
def test_rows_of_what_is_in_use_cover_what_is_not_free(kind: str, users: Any, deeds: Any) -> None:
    life = Life([kind], False)
    life.populate(users)
    for deed in deeds:
        life.do(*deed)
    m, start, end = life.m, 32 * 32768, 33 * 32768
    m.nodes[1].zone(3 if kind == "movable" else 2).drain()
    rows = pages_in_use(m.memmap_engine, start, end)
    used = np.zeros(32768, dtype=bool)
    for row in rows:
        first = int(row["pfn"]) - start
        assert not used[first : first + int(row["nr_pages"])].any()
        used[first : first + int(row["nr_pages"])] = True
    free = np.array([page.buddy for page in twin.pages(m, start, end)])
    assert (used == ~free).all()
    m.validate()
