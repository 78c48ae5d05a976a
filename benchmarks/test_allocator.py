"""W1 to W5 on zones of 2^22 and 2^24 pages, beside a plain C buddy in the same run."""

from __future__ import annotations

import statistics
import threading
import time
from typing import Any

import numpy as np
import pytest

from benchmarks.conftest import resident_mib
from benchmarks.drivers import drivers
from benchmarks.workloads import GFP, WORKLOADS, KmmBulk, fixed_cost, machine_of, python_pairs
from kmm.page_alloc import drain_all_pages

SIZES = [22, 24]


def rounds(benchmark: Any) -> int:
    """Five, or one where benchmarks only have to run."""
    return 5 if benchmark.enabled else 1


def time_of(fn: Any, times: int) -> float:
    return statistics.median(fn() for _ in range(times))


@pytest.mark.benchmark(group="targeted")
@pytest.mark.parametrize("log", SIZES)
@pytest.mark.parametrize("name", WORKLOADS)
def test_workload(benchmark: Any, name: str, log: int) -> None:
    ours, plain = WORKLOADS[name](1 << log)
    seen: list[float] = []
    benchmark.pedantic(lambda: seen.append(ours()), rounds=rounds(benchmark))
    benchmark.extra_info |= {
        "pages": 1 << log,
        "ns": round(statistics.median(seen), 2),
        "plain ns": round(time_of(plain, len(seen)), 2),
    }
    assert min(seen) > 0


@pytest.mark.benchmark(group="frequent")
def test_pair_from_python(benchmark: Any) -> None:
    m = machine_of(1 << 20)
    seen: list[float] = []
    benchmark.pedantic(lambda: seen.append(python_pairs(m)), rounds=rounds(benchmark))
    benchmark.extra_info["ns"] = round(statistics.median(seen), 1)
    m.validate()


@pytest.mark.benchmark(group="frequent")
def test_fixed_cost_of_a_bulk_call(benchmark: Any) -> None:
    m = machine_of(1 << 20)
    seen: list[float] = []
    benchmark.pedantic(lambda: seen.append(fixed_cost(m)), rounds=rounds(benchmark))
    benchmark.extra_info["ns"] = round(statistics.median(seen), 1)
    m.validate()


@pytest.mark.benchmark(group="yardsticks")
@pytest.mark.parametrize("log", SIZES)
def test_random_read_modify_write(benchmark: Any, log: int) -> None:
    """What any allocator pays for a record that is not in the cache."""
    buffer = np.zeros(2 << log, dtype=np.uint64)
    n = 4_000_000
    seen: list[float] = []
    benchmark.pedantic(
        lambda: seen.append(drivers().random_writes(buffer, 1 << log, n, 42) / n),
        rounds=rounds(benchmark),
    )
    benchmark.extra_info |= {"pages": 1 << log, "ns": round(statistics.median(seen), 2)}


@pytest.mark.benchmark(group="yardsticks")
def test_memset_of_64_bytes_a_page(benchmark: Any) -> None:
    """What a real kernel cannot avoid when memory arrives: here 2^24 pages, 1 GiB, warm."""
    pages = 1 << 24
    buffer = np.zeros(pages * 64, dtype=np.uint8)
    seen: list[float] = []
    benchmark.pedantic(
        lambda: seen.append(drivers().memset_pages(buffer, pages) / pages),
        rounds=rounds(benchmark),
        warmup_rounds=1,
    )
    benchmark.extra_info |= {"pages": pages, "ns": round(statistics.median(seen), 2)}


@pytest.mark.benchmark(group="targeted")
def test_host_memory_of_touched_pages(benchmark: Any) -> None:
    """Resident bytes a page once all of 2^24 were handed out and freed, and what stays."""
    pages = 1 << 24
    m = machine_of(pages)
    out = np.ones(pages, dtype=np.uint64)
    before = resident_mib()
    benchmark.pedantic(lambda: m.alloc_pages_bulk(pages, 0, GFP, 1, out), rounds=1)
    got = out[out > 1]
    before += got.nbytes / (1 << 20)
    taken = resident_mib()
    drivers().shuffle(got, 42)
    half = len(got) // 2
    m.free_pages_bulk(got[:half])
    touched = resident_mib()
    m.free_pages_bulk(got[half:])
    drain_all_pages(m)
    after = resident_mib()
    m.unplug("zone")
    benchmark.extra_info |= {
        "pages": pages,
        "MiB handed out": round(taken - before),
        "MiB half freed": round(touched - before),
        "MiB all free": round(after - before),
        "MiB unplugged": round(resident_mib() - before),
        "bytes a page": round((touched - before) * (1 << 20) / pages, 1),
    }
    assert touched - before < 16 * pages / (1 << 20) + 8
    assert after - before < 0.5 * (touched - before)


def work(m: Any) -> None:
    bulk, out = KmmBulk(m), np.zeros(1 << 20, dtype=np.uint64)
    for _ in range(12):
        n, _ns = bulk.take(out)
        drivers().shuffle(out[:n], 42)
        bulk.give(out[:n])


@pytest.mark.benchmark(group="targeted")
def test_two_machines_in_two_threads(benchmark: Any) -> None:
    """Bulk calls hold no lock of Python's: twice the work in the time of once."""
    machines = [machine_of(1 << 20) for _ in range(2)]
    work(machines[0])
    t = time.perf_counter()
    for m in machines:
        work(m)
    alone = time.perf_counter() - t

    def together() -> None:
        threads = [threading.Thread(target=work, args=(m,)) for m in machines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    benchmark.pedantic(together, rounds=rounds(benchmark))
    if benchmark.stats:
        benchmark.extra_info["times as fast"] = round(alone / benchmark.stats.stats.median, 2)
    for m in machines:
        m.validate()
