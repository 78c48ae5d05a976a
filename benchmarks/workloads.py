"""The workloads on a zone of M pages, for kmm and for the plain buddy, each in ns an operation.

Splitmix64 makes the random numbers, seed 42.  What is timed is the allocator's calls alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.conftest import START
from benchmarks.drivers import drivers
from kmm import GFP_HIGHUSER_MOVABLE, Machine, MachineConfig
from kmm.gfp import __GFP_THISNODE

SEED, OPS, BATCH = 42, 4_000_000, 512
GFP = GFP_HIGHUSER_MOVABLE | __GFP_THISNODE
Pfns = npt.NDArray[np.uint64]


class Bulk(Protocol):
    """Many pages in one call; times in ns."""

    def take(self, out: Pfns) -> tuple[int, int]: ...
    def give(self, pfns: Pfns) -> int: ...


def machine_of(pages: int) -> Machine:
    """A machine whose node 1 has a Movable zone of so many pages, all free."""
    config = {
        "memory": "2G",
        "maxmem": "2T",
        "cpus": 1,
        "nodes": [{"cpus": "0", "memory": "2G"}, {}],
        "cmdline": "memhp_default_state=online_movable",
    }
    m = Machine(MachineConfig.from_dict(config))
    m.plug("zone", 1, START, pages << 12)
    # No reserve: the plain buddy has none.
    m.write("/proc/sys/vm/min_free_kbytes", "0")
    assert m.nodes[1].zone(3).nr_free_pages == pages
    return m


class KmmBulk:
    """kmm's bulk calls, from Python."""

    def __init__(self, m: Machine) -> None:
        self.m = m

    def take(self, out: Pfns) -> tuple[int, int]:
        t = time.perf_counter_ns()
        got = self.m.alloc_pages_bulk(len(out), 0, GFP, 1, out)
        return len(got), time.perf_counter_ns() - t

    def give(self, pfns: Pfns) -> int:
        t = time.perf_counter_ns()
        self.m.free_pages_bulk(pfns)
        return time.perf_counter_ns() - t


class PlainBulk:
    """The plain buddy, one page after the other inside C."""

    def __init__(self, pages: int) -> None:
        self.subject = drivers().Subject.plain_of(pages)

    def take(self, out: Pfns) -> tuple[int, int]:
        got: tuple[int, int] = self.subject.take_many(out)
        return got

    def give(self, pfns: Pfns) -> int:
        ns: int = self.subject.give_many(pfns)
        return ns


def fill_and_drain(bulk: Bulk, pages: int, permuted: bool) -> float:
    """W1, and W2 if permuted: order 0 until exhausted, then freed."""
    out = np.zeros(pages, dtype=np.uint64)
    n, taking = bulk.take(out)
    assert n > pages * 0.99
    if permuted:
        drivers().shuffle(out[:n], SEED)
    return (taking + bulk.give(out[:n])) / (2 * n)


def churn_in_batches(bulk: Bulk, pages: int) -> float:
    """W3 in batches of 512."""
    d = drivers()
    live = np.zeros(pages + BATCH, dtype=np.uint64)
    n, _ = bulk.take(live[:pages])
    d.shuffle(live[:n], SEED)
    count = n // 2
    bulk.give(live[count:n])
    state = np.array([SEED], dtype=np.uint64)
    coins = np.random.default_rng(SEED).integers(0, 2, OPS // BATCH)
    ns = 0
    for coin in coins.tolist():
        if count - BATCH < pages * 45 // 100 or (coin and count + BATCH <= pages * 55 // 100):
            got, t = bulk.take(live[count : count + BATCH])
            count += got
        else:
            d.pick(live, count, BATCH, state)
            t = bulk.give(live[count - BATCH : count])
            count -= BATCH
        ns += t
    bulk.give(live[:count])
    return ns / (len(coins) * BATCH)


def churn(subject: Any, pages: int) -> float:
    """W3, one operation at a time."""
    live = np.zeros(pages + 1, dtype=np.uint64)
    n, _ = subject.take_many(live[:pages])
    drivers().shuffle(live[:n], SEED)
    subject.give_many(live[n // 2 : n])
    count, ns = subject.churn(live, n // 2, pages, OPS, SEED)
    subject.give_many(live[:count])
    return float(ns) / OPS


def mixed(subject: Any, pages: int) -> float:
    """W4."""
    return float(subject.mixed(pages, OPS, SEED)) / OPS


def pairs(subject: Any, pages: int) -> float:
    """W5 from Cython."""
    n = 5_000_000
    return float(subject.pairs(n)) / n


def python_pairs(m: Machine, n: int = 200_000) -> float:
    """W5 from Python, one call at a time."""
    t = time.perf_counter_ns()
    for _ in range(n):
        m.free_pages(m.alloc_pages())
    return (time.perf_counter_ns() - t) / n


def fixed_cost(m: Machine, n: int = 100_000) -> float:
    """What a bulk call costs beside its pages: half of a pair of calls for one page."""
    one = np.zeros(1, dtype=np.uint64)
    t = time.perf_counter_ns()
    for _ in range(n):
        m.alloc_pages_bulk(1, 0, GFP, 1, one)
        m.free_pages_bulk(one)
    return (time.perf_counter_ns() - t) / (2 * n)


Workload = Callable[[int], tuple[Callable[[], float], Callable[[], float]]]


def _bulk(act: Callable[[Bulk, int], float]) -> Workload:
    def both(pages: int) -> tuple[Callable[[], float], Callable[[], float]]:
        ours, plain = KmmBulk(machine_of(pages)), PlainBulk(pages)
        return lambda: act(ours, pages), lambda: act(plain, pages)

    return both


def _single(act: Callable[[Any, int], float]) -> Workload:
    def both(pages: int) -> tuple[Callable[[], float], Callable[[], float]]:
        subject = drivers().Subject
        ours, plain = subject.of(machine_of(pages), GFP, 1), subject.plain_of(pages)
        return lambda: act(ours, pages), lambda: act(plain, pages)

    return both


#: Each makes two functions of no argument, kmm's and the plain buddy's, that return ns.
WORKLOADS: dict[str, Workload] = {
    "W1 fill and drain, bulk": _bulk(lambda b, n: fill_and_drain(b, n, False)),
    "W2 the same, permuted, bulk": _bulk(lambda b, n: fill_and_drain(b, n, True)),
    "W3 churn, bulk of 512": _bulk(churn_in_batches),
    "W3 churn, singly": _single(churn),
    "W4 mixed orders, singly": _single(mixed),
    "W5 a pair, Cython": _single(pairs),
}
