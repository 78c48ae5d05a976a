"""Blocks full of movable pages are taken offline: what each page costs that has to move."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.conftest import GIB, MIB, big_machine, resident_mib
from kmm import Machine
from kmm.memory import User
from kmm.mempolicy import new_policy

SIZES = {"128MiB": GIB // 8, "1GiB": GIB, "16GiB": 16 * GIB, "64GiB": 64 * GIB, "256GiB": 256 * GIB}
#: Of the host, per page that moves: two records, a slot, a token twice, an entry on a list.
HOST_BYTES_PER_PAGE = 90
START = 1 << 40


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) << 10
    return 0


def _full(size: int) -> tuple[Machine, User]:
    """A machine with a DIMM full of anonymous pages, and one as large to move them to."""
    # Boot memory has to hold what describes the DIMMs.
    m = big_machine(128 * MIB, "4G" if size <= 16 * GIB else "32G", "8T")
    m.plug("from", 1, START, 2 * size)
    user = User(m, "user", "anon", size >> 12, policy=new_policy(m, "bind", [1]), tokens=True)
    user.grow(user.pages)
    user.write_tokens(0, np.arange(user.pages, dtype=np.uint64))
    m.plug("to", 0, START + 2 * size, 2 * size)
    assert m.nodes[0].zone(3).managed_pages == 2 * size >> 12
    return m, user


@pytest.mark.benchmark(group="targeted")
@pytest.mark.parametrize("name", SIZES)
def test_offline_of_full_blocks(benchmark: Any, name: str) -> None:
    size = SIZES[name]
    if (size >> 12) * HOST_BYTES_PER_PAGE > _available():
        pytest.skip("the host has too little memory")
    state: dict[str, Any] = {}

    def setup() -> None:
        state.clear()
        gc.collect()
        state["m"], state["user"] = _full(size)
        state["before"] = resident_mib()

    def run() -> None:
        m = state["m"]
        for block in range(START >> 27, (START + size) >> 27):
            m.write(f"/sys/devices/system/memory/memory{block}/state", "offline")

    benchmark.pedantic(run, setup=setup, rounds=5 if size <= GIB else 1)
    user, pages = state["user"], size >> 12
    assert (user.pfns() >= (START + 2 * size) >> 12).all()
    assert (user.read_tokens(0, pages) == np.arange(pages, dtype=np.uint64)).all()
    benchmark.extra_info["resident MiB"] = round(resident_mib() - state["before"], 1)
    if benchmark.stats:
        benchmark.extra_info["ns per page"] = round(benchmark.stats.stats.median * 1e9 / pages, 1)
