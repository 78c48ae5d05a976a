"""Numbers and sizes in messages, and that nobody says "1 pages"."""

from __future__ import annotations

import pytest

from kmm.scenario import Player, check_scenario, describe
from kmm.wording import about, counted, sized


@pytest.mark.parametrize(
    ("n", "noun", "said"),
    [
        (0, "page", "0 pages"),
        (1, "page", "1 page"),
        (2, "page", "2 pages"),
        (1, "directory", "1 directory"),
        (2, "directory", "2 directories"),
        (1, "block of order 3", "1 block of order 3"),
        (2, "block of order 3", "2 blocks of order 3"),
    ],
)
def test_what_is_counted(n: int, noun: str, said: str) -> None:
    assert counted(n, noun) == said


@pytest.mark.parametrize(
    ("nbytes", "exact", "roughly"),
    [
        (0, "0 bytes", "0 bytes"),
        (1, "1 byte", "1 byte"),
        (4097, "4097 bytes", "4 KiB"),
        (512 << 20, "512 MiB", "512 MiB"),
        (1536 << 20, "1536 MiB", "1.5 GiB"),
        (1 << 40, "1 TiB", "1 TiB"),
        ((1 << 40) + (2 << 20), "1048578 MiB", "1 TiB"),
        (3 << 39, "1536 GiB", "1.5 TiB"),
    ],
)
def test_sizes(nbytes: int, exact: str, roughly: str) -> None:
    assert (sized(nbytes), about(nbytes)) == (exact, roughly)


def test_a_dimm_of_a_terabyte_is_called_that() -> None:
    step = {"op": "plug", "id": "big", "node": 1, "addr": 1 << 40, "size": 1 << 40}
    assert describe(step) == "plug big: 1 TiB at 0x10000000000, node 1"


def test_one_of_each_is_said_in_the_singular() -> None:
    steps = [
        {"op": "alloc", "id": "a", "count": 1},
        {"op": "pages", "pfn": 300, "count": 1},
        {"op": "user", "id": "u", "pages": 2},
        {"op": "touch", "id": "u"},
        {"op": "pin", "id": "u"},
        {"op": "unpin", "id": "u"},
        {"op": "shrink", "id": "u", "pages": 1},
        {"op": "close", "id": "u"},
        {"op": "balloon", "id": "b", "pages": 1},
        {"op": "hugetlb", "count": 1},
        {"op": "user", "id": "h", "kind": "hugetlb", "pages": 512},
        {"op": "user", "id": "f", "kind": "file", "pages": 1},
        {"op": "fread", "id": "f"},
        {"op": "sh", "line": "hog", "load": {"kind": "anon", "user": "x", "pages": 1}},
        {"op": "sh", "line": "kill", "load": {"kind": "anon", "user": "x", "free": True}},
    ]
    player = Player(check_scenario({"machine": {"memory": "256M"}, "steps": steps}, "s"))
    said = [player.play(step).output for step in player.scenario.steps]
    assert said == [
        "1 of 1 block of order 0",
        "       1 page  0x400",
        "1 of kind anon, up to 2 pages each",
        "u: 2 of 2 touched, 2 of them came",
        "u: 1 page held",
        "u: 1 hold let go",
        "u: 1 page went, 1 is left",
        "u: 1 page went",
        "a balloon of up to 1 page",
        "hugepages-2048kB: 1 page (1 on node 0), 1 free, 0 reserved, 0 surplus",
        "1 of kind hugetlb, up to 1 huge page of 2048 kB each",
        "1 of kind file, up to 1 page each",
        "f: 1 of 1 page came",
        "x: 1 page",
        "x: 1 page freed",
    ]
    player.m.validate()
