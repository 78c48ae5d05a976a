"""Long random runs of every call; everything is recounted the slow way after each thousand."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kmm import KernelError, _scan, page_alloc
from tests.three_nodes import BLOCKS, GFPS, ORDERS, THISNODE, build, set_state

SECTION = 32768


class Run:
    """A machine, what is allocated on it, and random operations."""

    def __init__(self, seed: int) -> None:
        self.m = build()
        self.rng = random.Random(seed)
        self.live: dict[int, list[int]] = {order: [] for order in range(11)}
        for block in BLOCKS:
            set_state(self.m, block, self.rng.choice(["online_kernel", "online_movable"]))

    def request(self) -> dict[str, int]:
        return {
            "order": self.rng.choice(ORDERS),
            "gfp": self.rng.choice(GFPS) | self.rng.choice([0, THISNODE]),
            "nid": self.rng.randrange(3),
            "cpu": self.rng.randrange(3),
        }

    def take(self, order: int, share: float) -> list[int]:
        """Forget a random part of the live blocks of an order and return it."""
        pool = self.live[order]
        self.rng.shuffle(pool)
        keep = int(len(pool) * (1 - share))
        self.live[order] = pool[:keep]
        return pool[keep:]

    # -- operations -----------------------------------------------------------------------

    def allocate(self) -> None:
        ask = self.request()
        try:
            self.live[ask["order"]].append(self.m.alloc_pages(**ask))
        except KernelError:
            self.free_bulk()

    def free(self) -> None:
        order = self.rng.choice(ORDERS)
        if self.live[order]:
            pool = self.live[order]
            at = self.rng.randrange(len(pool))
            pool[at], pool[-1] = pool[-1], pool[at]
            self.m.free_pages(pool.pop(), order, cpu=self.rng.randrange(3))

    def allocate_bulk(self) -> None:
        ask = self.request()
        n = max(1, self.rng.choice([10, 500, 20000]) >> ask["order"])
        self.live[ask["order"]] += self.m.alloc_pages_bulk(n, **ask).tolist()

    def free_bulk(self) -> None:
        order = self.rng.choice(ORDERS)
        pfns = self.take(order, self.rng.random())
        if self.rng.random() < 0.5:
            pfns.sort()
        self.m.free_pages_bulk(pfns, order, cpu=self.rng.randrange(3))

    def free_wrongly(self) -> None:
        order = self.rng.choice(ORDERS)
        if self.live[order]:
            pfn = self.rng.choice(self.live[order])
            with pytest.raises(KernelError):
                self.m.free_pages(pfn, (order + 1) % 11)
            with pytest.raises(KernelError):
                self.m.free_pages_bulk([pfn, pfn], order)

    def split(self) -> None:
        order = self.rng.choice(ORDERS)
        if self.live[order]:
            pfn = self.live[order].pop()
            self.m.split_page(pfn, order)
            self.live[0] += range(pfn, pfn + (1 << order))

    def drain(self) -> None:
        self.rng.choice(self.m.all_zones()).drain(self.rng.randrange(-1, 3))

    def without_pcp(self) -> None:
        zone = self.rng.choice(self.m.all_zones())
        page_alloc.zone_pcp_disable(self.m, zone)
        for _ in range(5):
            self.allocate()
            self.free()
        page_alloc.zone_pcp_enable(self.m, zone)

    def isolate(self) -> None:
        first = self.rng.choice(BLOCKS)
        zone = self.m.page_zone(first)
        if zone is None or self.m.memory_blocks[first // SECTION].state != "online":
            return
        start = first + self.rng.randrange(32) * 1024
        end = min(start + self.rng.randrange(1, 6) * 1024, first + SECTION)
        isolated = _scan.start_isolate_page_range(zone, start, end) < 0
        for _ in range(5):
            self.allocate()
            self.free()
        if isolated:
            _scan.undo_isolate_page_range(zone, start, end, self.rng.randrange(3))

    def block(self) -> None:
        """Online a block, or try to take one offline, often after freeing what is in it."""
        first = self.rng.choice(BLOCKS)
        if self.m.memory_blocks[first // SECTION].state == "offline":
            set_state(self.m, first, self.rng.choice(["online_kernel", "online_movable"]))
            return
        if self.rng.random() < 0.7:
            for order, pool in self.live.items():
                inside = [p for p in pool if first <= p < first + SECTION]
                self.m.free_pages_bulk(np.array(inside, dtype=np.uint64), order)
                self.live[order] = [p for p in pool if not first <= p < first + SECTION]
        try:
            set_state(self.m, first, "offline")
        except KernelError:
            assert any(first <= p < first + SECTION for ps in self.live.values() for p in ps)

    def tunable(self) -> None:
        name, values = self.rng.choice(
            [
                ("min_free_kbytes", [0, 4000, 45056, 120000]),
                ("watermark_scale_factor", [1, 10, 1000]),
                ("watermark_boost_factor", [0, 15000]),
                ("percpu_pagelist_high_fraction", [0, 8, 3000]),
                ("lowmem_reserve_ratio", ["256 256 32 0 0", "0 1 1"]),
            ]
        )
        self.m.write(f"/proc/sys/vm/{name}", str(self.rng.choice(values)))


OPERATIONS = {
    Run.allocate: 400,
    Run.free: 400,
    Run.allocate_bulk: 25,
    Run.free_bulk: 25,
    Run.free_wrongly: 10,
    Run.split: 20,
    Run.drain: 10,
    Run.without_pcp: 5,
    Run.isolate: 10,
    Run.block: 6,
    Run.tunable: 5,
}


def test_everything_adds_up_after_each_thousand_operations() -> None:
    run = Run(seed=42)
    names, weights = list(OPERATIONS), list(OPERATIONS.values())
    for _ in range(20):
        for operation in run.rng.choices(names, weights, k=1000):
            operation(run)
        run.m.validate()
    for order, pfns in run.live.items():
        run.m.free_pages_bulk(pfns, order)
    page_alloc.drain_all_pages(run.m)
    run.m.validate()
    for zone in run.m.all_zones():
        assert zone.pcp_pages() == 0
        if zone.nid:  # the others hold the memmaps
            assert zone.nr_free_pages == zone.managed_pages
    sums = [sum(z.vm_events[e] for z in run.m.all_zones()) for e in ("numa_miss", "numa_foreign")]
    assert sums[0] == sums[1] > 0
