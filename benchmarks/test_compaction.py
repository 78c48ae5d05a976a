"""Compaction of a fragmented zone: what each page costs that moves."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

from benchmarks.conftest import GIB, MIB, big_machine
from kmm.fragment import FragmentTarget, fragment, measure
from kmm.vmstat import all_vm_events

START = 1 << 40
SIZES = {"1GiB": GIB, "16GiB": 16 * GIB}


def _machine(size: int) -> Any:
    m = big_machine(128 * MIB, "4G", "8T")
    m.plug("a", 1, START, size)
    return m


def _moved(m: Any) -> int:
    return all_vm_events(m)["pgmigrate_success"]


@pytest.mark.benchmark(group="targeted")
@pytest.mark.parametrize("name", SIZES)
def test_compact_a_node(benchmark: Any, name: str) -> None:
    state: dict[str, Any] = {}

    def setup() -> None:
        state.clear()
        gc.collect()
        m = state["m"] = _machine(SIZES[name])
        fragment(m, 1, FragmentTarget(0.4, large=0.05), 1)
        state["before"] = _moved(m)

    def run() -> None:
        state["m"].write("/sys/devices/system/node/node1/compact", "1")

    benchmark.pedantic(run, setup=setup, rounds=5 if SIZES[name] <= GIB else 1)
    m = state["m"]
    moved = _moved(m) - state["before"]
    assert moved > SIZES[name] >> 16
    assert measure(m, 1).large > 0.3
    if benchmark.stats:
        benchmark.extra_info["ns per page"] = round(benchmark.stats.stats.median * 1e9 / moved, 1)


@pytest.mark.benchmark(group="targeted")
@pytest.mark.parametrize("name", SIZES)
def test_fragment_a_zone(benchmark: Any, name: str) -> None:
    state: dict[str, Any] = {}

    def setup() -> None:
        state.clear()
        gc.collect()
        state["m"] = _machine(SIZES[name])

    def run() -> None:
        state["reached"] = fragment(state["m"], 1, FragmentTarget(0.4, large=0.05), 1)

    benchmark.pedantic(run, setup=setup, rounds=3 if SIZES[name] <= GIB else 1)
    reached = state["reached"]
    assert np.isclose(reached.large, 0.05, atol=0.01)
    if benchmark.stats:
        pages = reached.managed_pages
        benchmark.extra_info["ns per page"] = round(benchmark.stats.stats.median * 1e9 / pages, 1)
