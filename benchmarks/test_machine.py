"""Whole machines: terabytes plugged, onlined, taken offline and unplugged."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from benchmarks.conftest import MIB, TIB, big_machine, resident_mib
from kmm.firmware import device_memory

SIZES = {
    "1TiB blocks 128MiB": (TIB, 128 * MIB, "64G"),
    "1TiB blocks 2GiB": (TIB, 2048 * MIB, "64G"),
    "61TiB blocks 2GiB": (61 * TIB, 2048 * MIB, "2T"),
}


@pytest.mark.benchmark(group="machine")
@pytest.mark.parametrize("name", SIZES)
def test_plug_and_online(benchmark: Any, name: str) -> None:
    size, block, memory = SIZES[name]
    state: dict[str, Any] = {}

    def setup() -> None:
        state.clear()
        gc.collect()
        state["before"] = resident_mib()
        state["m"] = big_machine(block, memory)

    def run() -> None:
        start = device_memory(state["m"].config)[0]
        assert state["m"].plug("big", 1, start, size) == 0

    benchmark.pedantic(run, setup=setup, rounds=3)
    assert state["m"].nodes[1].zone(3).present_pages == size >> 12
    benchmark.extra_info["resident MiB"] = round(resident_mib() - state["before"], 1)
    if benchmark.stats:
        benchmark.extra_info["us per block"] = round(
            benchmark.stats.stats.median * 1e6 / (size // block), 1
        )


@pytest.mark.benchmark(group="machine")
@pytest.mark.parametrize("name", list(SIZES)[:2])
def test_offline_and_unplug(benchmark: Any, name: str) -> None:
    size, block, memory = SIZES[name]
    state: dict[str, Any] = {}

    def setup() -> None:
        state["m"] = big_machine(block, memory)
        state["m"].plug("big", 1, device_memory(state["m"].config)[0], size)

    def run() -> None:
        assert state["m"].unplug("big") == 0

    benchmark.pedantic(run, setup=setup, rounds=3)
    assert 1 not in state["m"].n_online
