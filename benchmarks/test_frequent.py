"""One call at a time."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.conftest import START, big_machine
from kmm import GFP_KERNEL
from kmm.trace import traced


@pytest.mark.benchmark(group="frequent")
def test_alloc_and_free_one_page(benchmark: Any) -> None:
    m = big_machine(128 << 20, "4G")

    def pair() -> None:
        m.free_pages(m.alloc_pages())

    benchmark(pair)
    m.validate()


@pytest.mark.benchmark(group="frequent")
@pytest.mark.parametrize("n", [512, 65536])
def test_bulk_alloc_and_free(benchmark: Any, n: int) -> None:
    m = big_machine(128 << 20, "4G")

    def pair() -> None:
        m.free_pages_bulk(m.alloc_pages_bulk(n, 0, GFP_KERNEL))

    benchmark(pair)
    if benchmark.stats:
        benchmark.extra_info["ns per page"] = round(benchmark.stats.stats.median * 1e9 / n, 1)
    m.validate()


@pytest.mark.benchmark(group="targeted")
def test_online_and_offline_one_block(benchmark: Any) -> None:
    m = big_machine(128 << 20, "4G")
    m.plug("a", 1, START, 1 << 30)
    path = f"/sys/devices/system/memory/memory{START >> 27}/state"

    def pair() -> None:
        m.write(path, "offline")
        m.write(path, "online_movable")

    benchmark(pair)
    m.validate()


@pytest.mark.benchmark(group="tracing off")
@pytest.mark.parametrize("kind", ["plain", "traced"])
def test_call_of_a_kernel_function(benchmark: Any, kind: str) -> None:
    m = big_machine(128 << 20, "4G")

    def kernel_function(m: Any) -> None:
        pass

    benchmark(traced(kernel_function) if kind == "traced" else kernel_function, m)
    assert m.kprobes is None
