"""Looking at 61 TiB: the files of /proc, and the same as arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks.conftest import MIB, TIB, big_machine, resident_mib
from kmm import Machine, procfs
from kmm.firmware import device_memory
from kmm.params import NR_PAGES_MAX


@pytest.fixture(scope="module")
def huge() -> Iterator[Machine]:
    m = big_machine(2048 * MIB, "2T")
    assert m.plug("big", 1, device_memory(m.config)[0], 61 * TIB) == 0
    yield m
    m.unplug("big")


def first_pfn(m: Machine) -> int:
    return device_memory(m.config)[0] >> 12


VIEWS: dict[str, Callable[[Machine], object]] = {
    "buddyinfo": lambda m: m.read("/proc/buddyinfo"),
    "pagetypeinfo": lambda m: m.read("/proc/pagetypeinfo"),
    "zoneinfo": lambda m: m.read("/proc/zoneinfo"),
    "vmstat": lambda m: m.read("/proc/vmstat"),
    "free_blocks": lambda m: m.free_blocks(),
    "kpageflags of 4 GiB": lambda m: m.kpageflags(first_pfn(m), 1 << 20),
    "kpageflags of 1 TiB in runs": lambda m: procfs.kpageflags(m, first_pfn(m), 1 << 28),
    "kpageflags of all in runs": lambda m: procfs.kpageflags(m, 0, NR_PAGES_MAX),
}


@pytest.mark.benchmark(group="targeted")
@pytest.mark.parametrize("name", VIEWS)
def test_look_at_61_tib(benchmark: Any, huge: Machine, name: str) -> None:
    VIEWS[name](huge)
    before = resident_mib()
    benchmark.pedantic(VIEWS[name], args=(huge,), rounds=7)
    benchmark.extra_info["resident MiB"] = round(resident_mib() - before, 1)
    if benchmark.stats:
        benchmark.extra_info["ms"] = round(benchmark.stats.stats.median * 1e3, 2)
