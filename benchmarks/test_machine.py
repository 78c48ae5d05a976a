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
    "8TiB blocks 2GiB": (8 * TIB, 2048 * MIB, "256G"),
}
ADDRESSES = 64 * TIB


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
def test_plug_and_online_all_there_can_be(benchmark: Any) -> None:
    """All addresses above boot memory; a first terabyte pays for the memmap of the rest."""
    state: dict[str, Any] = {}

    def setup() -> None:
        state.clear()
        gc.collect()
        state["before"] = resident_mib()
        state["m"] = big_machine(2048 * MIB, "64G")

    def run() -> None:
        m = state["m"]
        start = device_memory(m.config)[0]
        m.write("/sys/devices/system/memory/auto_online_blocks", "online_kernel")
        assert m.plug("first", 1, start, TIB) == 0
        m.write("/sys/devices/system/memory/auto_online_blocks", "online_movable")
        assert m.plug("rest", 1, start + TIB, ADDRESSES - start - TIB) == 0

    benchmark.pedantic(run, setup=setup, rounds=3)
    present = state["m"].nodes[1].node_present_pages
    assert present == (ADDRESSES - device_memory(state["m"].config)[0]) >> 12
    benchmark.extra_info["resident MiB"] = round(resident_mib() - state["before"], 1)
    if benchmark.stats:
        benchmark.extra_info["us per block"] = round(
            benchmark.stats.stats.median * 1e6 / (present >> 19), 1
        )


@pytest.mark.benchmark(group="machine")
@pytest.mark.parametrize("name", SIZES)
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
    if benchmark.stats:
        benchmark.extra_info["us per block"] = round(
            benchmark.stats.stats.median * 1e6 / (size // block), 1
        )


@pytest.mark.benchmark(group="machine")
@pytest.mark.parametrize("blocks", [1, 8192])
def test_offline_and_online_one_block_beside(benchmark: Any, blocks: int) -> None:
    m = big_machine(128 * MIB, "64G")
    start = device_memory(m.config)[0]
    m.plug("others", 1, start, blocks * 128 * MIB)
    m.plug("one", 1, start + TIB, 128 * MIB)
    path = f"/sys/devices/system/memory/memory{(start + TIB) // (128 * MIB)}/state"

    def pair() -> None:
        m.write(path, "offline")
        m.write(path, "online_movable")

    benchmark(pair)
    if benchmark.stats:
        benchmark.extra_info["us a pair"] = round(benchmark.stats.stats.median * 1e6, 1)
