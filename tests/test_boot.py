"""What a machine boots with."""

from __future__ import annotations

from itertools import pairwise

import pytest

from kmm.boot import e820

GIB = 1 << 30


@pytest.mark.parametrize("high", [0, GIB, 1020 * GIB, 2048 * GIB])
def test_the_ranges_of_firmwares_map_do_not_overlap(high: int) -> None:
    rows = e820(2 * GIB, high)
    assert all(a[1] < b[0] for a, b in pairwise(rows))
    assert sum(e + 1 - s for s, e, kind in rows if kind == "System RAM") > high
