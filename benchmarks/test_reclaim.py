"""Reclaim: clean file pages dropped, anonymous ones swapped, files read and written."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.conftest import big_machine
from kmm._vmscan import shrink_lists
from kmm.gfp import GFP_KERNEL
from kmm.memory import User
from kmm.params import GiB, MiB
from kmm.vmscan import ScanControl

PAGES = 1 << 20


def _report(benchmark: Any, pages: int) -> None:
    if benchmark.stats:
        benchmark.extra_info["ns per page"] = round(benchmark.stats.stats.median * 1e9 / pages, 1)


def _scan(user: User, kswapd: bool = True) -> int:
    m = user.m
    nid = m.page_zone(int(user.pfns(0, 1)[0])).nid  # type: ignore[union-attr]
    sc = ScanControl(1 << 40, GFP_KERNEL, 3, kswapd=kswapd, priority=0)
    shrink_lists(m, nid, sc)
    return sc.nr_reclaimed


@pytest.mark.benchmark(group="reclaim")
@pytest.mark.parametrize("tokens", [False, True])
def test_clean_file_pages_are_reclaimed(benchmark: Any, tokens: bool) -> None:
    m = big_machine(128 * MiB, "16G")
    user = User(m, "f", "file", PAGES, tokens=tokens)

    def setup() -> None:
        user.engine.let_go(m, 0, PAGES, 0)
        user.read(0, PAGES)

    def run() -> None:
        assert _scan(user) == PAGES

    benchmark.pedantic(run, setup=setup, rounds=3)
    _report(benchmark, PAGES)


@pytest.mark.benchmark(group="reclaim")
@pytest.mark.parametrize("kind", ["anon", "shmem"])
def test_pages_are_swapped_out(benchmark: Any, kind: str) -> None:
    m = big_machine(128 * MiB, "16G")
    m.swapon(8 * GiB)
    user = User(m, "u", kind, PAGES, tokens=True)

    def setup() -> None:
        user.release(0, PAGES)
        user.write(0, PAGES)
        if kind == "anon":
            assert _scan(user) == 0  # they were touched

    def run() -> None:
        assert _scan(user) == PAGES

    benchmark.pedantic(run, setup=setup, rounds=3)
    _report(benchmark, PAGES)


@pytest.mark.benchmark(group="reclaim")
def test_pages_are_swapped_in(benchmark: Any) -> None:
    m = big_machine(128 * MiB, "16G")
    m.swapon(8 * GiB)
    user = User(m, "u", "shmem", PAGES, tokens=True)
    user.write(0, PAGES)

    def setup() -> None:
        while user.nr_present:
            _scan(user)

    def run() -> None:
        assert user.read(0, PAGES) == PAGES

    benchmark.pedantic(run, setup=setup, rounds=3)
    _report(benchmark, PAGES)


@pytest.mark.benchmark(group="reclaim")
def test_a_file_larger_than_memory_is_read(benchmark: Any) -> None:
    """Faults, kswapd's scans and frees together."""
    m = big_machine(128 * MiB, "4G")
    user = User(m, "f", "file", 4 * PAGES)

    def run() -> None:
        user.read(0, 4 * PAGES)

    benchmark.pedantic(run, rounds=2)
    _report(benchmark, 4 * PAGES)


@pytest.mark.benchmark(group="reclaim")
def test_a_file_is_written(benchmark: Any) -> None:
    """Dirtied, written back above the background limit, and dropped."""
    m = big_machine(128 * MiB, "16G")
    user = User(m, "f", "file", PAGES, tokens=True)

    def run() -> None:
        user.write(0, PAGES)
        m.sync()
        m.write("/proc/sys/vm/drop_caches", "1")
        assert user.nr_present == 0

    benchmark.pedantic(run, rounds=3)
    _report(benchmark, PAGES)
