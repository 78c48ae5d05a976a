"""The whole allocator against its readable twin, list order included."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kmm import (
    GFP_ATOMIC,
    GFP_HIGHUSER_MOVABLE,
    GFP_KERNEL,
    GFP_NOWAIT,
    KernelError,
    _scan,
    page_alloc,
)
from kmm.compaction import COMPACT_SKIPPED
from kmm.mmzone import Zone
from tests.reference.allocator_twin import highest_zone
from tests.reference.compare import assert_same
from tests.reference.hotplug_twin import SECTION, TwinMachine
from tests.reference.watermark_twin import set_pageset, setup_lowmem_reserve, setup_per_zone_wmarks
from tests.reference.zone_twin import TwinZone
from tests.three_nodes import BLOCKS, GFPS, MEMALLOC, ORDERS, THISNODE, TYPES, build, set_state

# A class body would mangle the name.
alloc_from_nodes = page_alloc.__alloc_pages


class AllocatorAgainstTwin(RuleBasedStateMachine):
    """Random calls on three nodes with hot-plugged zones; counters and lists are compared."""

    def __init__(self) -> None:
        super().__init__()
        self.m = build()
        # Whom the allocator calls for help is tested elsewhere; here nobody can.  Even without a
        # page to move compaction would turn free lists round.
        self.m.run_kswapds = lambda: None  # type: ignore[method-assign]
        self.m.ops.try_to_free_pages = lambda *request: 0
        self.m.ops.try_to_compact_pages = lambda *_: (COMPACT_SKIPPED, -1)
        self.twin = TwinMachine.of(self.m)
        self.disabled: TwinZone | None = None

    def real(self, zone: TwinZone) -> Zone:
        return self.m.nodes[zone.nid].zone(zone.idx)

    @initialize(
        how=st.lists(st.sampled_from(["kernel", "movable", "off"]), min_size=6, max_size=6),
        min_free=st.sampled_from([None, 0, 2000, 20000]),
        fraction=st.sampled_from([0, 0, 100, 3000]),
        grouped=st.sampled_from([True, True, True, True, False]),
    )
    def start(self, how: list[str], min_free: int | None, fraction: int, grouped: bool) -> None:
        for block, word in enumerate(how):
            if word != "off":
                self.online(block, word == "movable")
        if min_free is not None:
            self.write_min_free(min_free)
        self.write_fraction(fraction)
        if not grouped:
            # As on a machine of a few MiB, until a zone comes or goes.
            self.m.memmap_engine.grouping_disabled = True
            self.twin.pages.grouping_disabled = True

    # -- taking -------------------------------------------------------------------------

    @rule(
        order=st.sampled_from(ORDERS),
        gfp=st.sampled_from(GFPS),
        thisnode=st.booleans(),
        nid=st.integers(0, 2),
        cpu=st.integers(0, 2),
        n=st.integers(1, 20),
    )
    def allocate(self, order: int, gfp: int, thisnode: bool, nid: int, cpu: int, n: int) -> None:
        gfp |= THISNODE * thisnode
        for _ in range(n):
            want = self.twin.alloc_pages(order, gfp, nid, cpu)
            assert self._one(order, gfp, nid, cpu) == want

    def _one(self, order: int, gfp: int, nid: int, cpu: int) -> int | None:
        try:
            return self.m.alloc_pages(order, gfp, nid, cpu)
        except KernelError:
            return None

    @rule(
        order=st.sampled_from(ORDERS),
        gfp=st.sampled_from(GFPS),
        thisnode=st.booleans(),
        nid=st.integers(0, 2),
        cpu=st.integers(0, 2),
        pages=st.sampled_from([30, 300, 1500, 32768, 400000]),
    )
    def allocate_bulk(
        self, order: int, gfp: int, thisnode: bool, nid: int, cpu: int, pages: int
    ) -> None:
        gfp |= THISNODE * thisnode
        n = max(1, min(pages >> order, 400))
        want = []
        for _ in range(n):
            pfn = self.twin.alloc_pages(order, gfp, nid, cpu)
            if pfn is None:
                break
            want.append(pfn)
        assert self.m.alloc_pages_bulk(n, order, gfp, nid, cpu=cpu).tolist() == want

    @rule(
        nid=st.integers(0, 2),
        leave=st.integers(0, 3000),
        gfp=st.sampled_from([GFP_KERNEL, GFP_HIGHUSER_MOVABLE]),
    )
    def empty_a_node(self, nid: int, leave: int, gfp: int) -> None:
        """Down to near the marks, in large blocks and then small ones."""
        gfp |= THISNODE
        zones = self.twin.zones_of(nid)[: highest_zone(gfp) + 1]
        for order in (10, 7, 5, 2, 0):
            while sum(z.nr_free_pages for z in zones) > leave:
                want = self.twin.alloc_pages(order, gfp, nid, 0)
                assert self._one(order, gfp, nid, 0) == want
                if want is None:
                    break

    @rule(
        nid=st.integers(0, 2),
        leave=st.sampled_from([0, 20, 600]),
        order=st.integers(1, 5),
        cpu=st.integers(0, 2),
        then=st.sampled_from([0, GFP_KERNEL, GFP_NOWAIT, GFP_ATOMIC]),
    )
    def atomic_requests_at_the_marks(
        self, nid: int, leave: int, order: int, cpu: int, then: int
    ) -> None:
        """They set pageblocks aside, which others get at the very end or open by waiting."""
        self.empty_a_node(nid, leave, GFP_KERNEL)
        self.allocate(order, GFP_ATOMIC, True, nid, cpu, 5)
        self.free(cpu, cpu, 0.02)
        if then:
            self.allocate(order, then, True, nid, cpu, 3)
            self.allocate_bulk(0, then, True, nid, cpu, 300)

    @rule(
        order=st.sampled_from(ORDERS),
        gfp=st.sampled_from([GFP_KERNEL, GFP_HIGHUSER_MOVABLE, GFP_NOWAIT]),
        nid=st.integers(0, 2),
        nodes=st.sets(st.integers(0, 2)),
        cpu=st.integers(0, 2),
    )
    def allocate_from_some_nodes(
        self, order: int, gfp: int, nid: int, nodes: set[int], cpu: int
    ) -> None:
        want = self.twin.alloc_from_nodes(order, gfp, nid, cpu, nodes)
        try:
            got = alloc_from_nodes(self.m, gfp, order, nid, nodes, cpu)
        except KernelError:
            got = None
        assert got == want

    # -- giving back --------------------------------------------------------------------

    def _some(self, seed: int, share: float, most: int) -> list[int]:
        heads = sorted(self.twin.pages.used)
        random.Random(seed).shuffle(heads)
        return heads[: min(int(len(heads) * share) + 1, most)]

    @rule(seed=st.integers(0, 2**16), cpu=st.integers(0, 2), share=st.floats(0, 1))
    def free(self, seed: int, cpu: int, share: float) -> None:
        for pfn in self._some(seed, share, 300):
            order = self.twin.pages.used[pfn]
            self.twin.free_pages(pfn, cpu)
            self.m.free_pages(pfn, order, cpu=cpu)

    @rule(seed=st.integers(0, 2**16), cpu=st.integers(0, 2), share=st.floats(0, 1))
    def free_bulk(self, seed: int, cpu: int, share: float) -> None:
        pools: dict[int, list[int]] = {}
        for pfn in self._some(seed, share, 1000):
            pools.setdefault(self.twin.pages.used[pfn], []).append(pfn)
        for order, pfns in pools.items():
            if seed % 2:  # neighbours are freed as one
                pfns.sort()
            self._free_all(pfns, order, cpu)

    def _free_all(self, pfns: list[int], order: int, cpu: int) -> None:
        for pfn in pfns:
            self.twin.free_pages(pfn, cpu)
        self.m.free_pages_bulk(np.array(pfns, dtype=np.uint64), order, cpu=cpu)

    @rule(seed=st.integers(0, 2**16))
    def free_wrongly(self, seed: int) -> None:
        for pfn in self._some(seed, 0, 1):
            order = self.twin.pages.used[pfn]
            for bad, o in ((pfn, (order + 1) % 11), (pfn + (1 << order) // 2 + 1, order)):
                if bad not in self.twin.pages.used or self.twin.pages.used[bad] != o:
                    with pytest.raises(KernelError):
                        self.m.free_pages(bad, o)
                    with pytest.raises(KernelError):
                        self.m.free_pages_bulk([pfn, bad] if o == order else [bad], o)

    @rule(seed=st.integers(0, 2**16))
    def split(self, seed: int) -> None:
        for pfn in self._some(seed, 0.02, 3):
            self.m.split_page(pfn, self.twin.pages.used[pfn])
            self.twin.split_page(pfn)

    @rule(
        seed=st.integers(0, 2**16), cpu=st.integers(0, 2), chunk=st.sampled_from([1, 2, 4, 8, 32])
    )
    def sieve(self, seed: int, cpu: int, chunk: int) -> None:
        """Free every second piece of some large blocks, so that what is free is small."""
        used = self.twin.pages.used
        large = [p for p in used if used[p] >= 7]
        for pfn in random.Random(seed).sample(large, min(3, len(large))):
            order = used[pfn]
            self.m.split_page(pfn, order)
            self.twin.split_page(pfn)
            pfns = [p for p in range(pfn, pfn + (1 << order)) if p // chunk % 2]
            self._free_all(pfns, 0, cpu)
            chunk = max(1, chunk // 2)

    @rule(
        nid=st.integers(0, 2),
        types=st.permutations(TYPES),
        order=st.integers(0, 3),
        chunk=st.sampled_from([1, 2, 4, 8, 32]),
        cpu=st.integers(0, 2),
        drained=st.booleans(),
        how=st.sampled_from([None, 0, GFP_ATOMIC]),
    )
    def starve(
        self,
        nid: int,
        types: list[int],
        order: int,
        chunk: int,
        cpu: int,
        drained: bool,
        how: int | None,
    ) -> None:
        """Leave a node nothing but small pieces of one type, and ask for another.

        Pages that wait on per-CPU lists while their pageblock is set aside come back to the
        lists of its former type.
        """
        first, then, _ = types
        self.empty_a_node(nid, 0, GFP_KERNEL | first | MEMALLOC)
        self.sieve(nid, cpu, chunk)
        if drained:
            self.drain_all()
        if how is not None:
            self.allocate(order, how | (then if drained else first), True, nid, cpu, 5)
        self.drain_all()
        self.allocate(order, GFP_KERNEL | then | MEMALLOC, True, nid, cpu, 9)
        self.allocate(0, GFP_ATOMIC, True, nid, cpu, 3)

    # -- per-CPU lists --------------------------------------------------------------------

    def _one_of_the_zones(self, number: int) -> TwinZone:
        populated = [z for z in self.twin.zones if z.present]
        return populated[number % len(populated)]

    @rule(number=st.integers(0, 14), cpu=st.integers(-1, 2))
    def drain(self, number: int, cpu: int) -> None:
        zone = self._one_of_the_zones(number)
        zone.drain(cpu)
        self.real(zone).drain(cpu)

    @rule()
    def drain_all(self) -> None:
        self.twin.drain_all()
        page_alloc.drain_all_pages(self.m)

    @precondition(lambda self: self.disabled is None)
    @rule(number=st.integers(0, 14))
    def pcp_disable(self, number: int) -> None:
        self.disabled = self._one_of_the_zones(number)
        self.disabled.pcp_disable()
        page_alloc.zone_pcp_disable(self.m, self.real(self.disabled))

    @precondition(lambda self: self.disabled is not None)
    @rule()
    def pcp_enable(self) -> None:
        assert self.disabled is not None
        self.disabled.pcp_enable()
        page_alloc.zone_pcp_enable(self.m, self.real(self.disabled))
        self.disabled = None

    # -- isolation, blocks, tunables --------------------------------------------------------

    @rule(block=st.integers(0, 5), first=st.integers(0, 63), n=st.integers(1, 64))
    def isolate(self, block: int, first: int, n: int) -> None:
        zone = self.twin.block_zone.get(BLOCKS[block])
        if zone is None:
            return
        start = BLOCKS[block] + first * 512
        end = min(start + n * 512, BLOCKS[block] + SECTION)
        if any(self.twin.pages.used.get(p - p % 1024) == 10 for p in (start, end) if p % 1024):
            return  # half of an allocated block: the kernel would have to migrate it first
        blocked = zone.isolate(start, end)
        got = _scan.start_isolate_page_range(self.real(zone), start, end)
        assert got == (-1 if blocked is None else blocked)

    @rule(number=st.integers(0, 2**16), undo=st.booleans(), cpu=st.integers(0, 2))
    def isolate_what_waits_on_a_cpu(self, number: int, undo: bool, cpu: int) -> None:
        """Pages on per-CPU lists do not stand in the way; they find their place when they go."""
        zones = set(self.twin.block_zone.values())
        waiting = sorted(p for z in zones for c in z.pcps for lst in c.lists for p, _ in lst)
        if not waiting:
            return
        block = waiting[number % len(waiting)] // 512 * 512
        self.isolate(BLOCKS.index(block // SECTION * SECTION), block % SECTION // 512, 1)
        if undo:
            self.undo_isolate(BLOCKS.index(block // SECTION * SECTION), 1)
        self.free(number, cpu, 0.1)
        self.drain_all()

    @rule(block=st.integers(0, 5), mt=st.sampled_from([0, 1, 1, 2]))
    def undo_isolate(self, block: int, mt: int) -> None:
        zone = self.twin.block_zone.get(BLOCKS[block])
        if zone is not None:
            zone.undo_isolate(BLOCKS[block], BLOCKS[block] + SECTION, mt)
            end = BLOCKS[block] + SECTION
            _scan.undo_isolate_page_range(self.real(zone), BLOCKS[block], end, mt)

    @precondition(lambda self: self.disabled is None)
    @rule(block=st.integers(0, 5), movable=st.booleans())
    def online(self, block: int, movable: bool) -> None:
        first = BLOCKS[block]
        if first not in self.twin.block_zone:
            set_state(self.m, first, "online_movable" if movable else "online_kernel")
            self.twin.online(first, self.twin.zone(block // 2, 3 if movable else 2))

    @precondition(lambda self: self.disabled is None)
    @rule(block=st.integers(0, 5), clear=st.booleans(), cpu=st.integers(0, 2))
    def offline(self, block: int, clear: bool, cpu: int) -> None:
        """Take a block offline, after freeing what lies in it or in spite of it."""
        first = BLOCKS[block]
        if first not in self.twin.block_zone:
            return
        if clear:
            for pfn in [p for p in self.twin.pages.used if first <= p < first + SECTION]:
                order = self.twin.pages.used[pfn]
                self.twin.free_pages(pfn, cpu)
                self.m.free_pages(pfn, order, cpu=cpu)
        try:
            set_state(self.m, first, "offline")
            went = True
        except KernelError:
            went = False
        assert self.twin.offline(first) == went

    @precondition(lambda self: self.disabled is None)
    @rule(value=st.sampled_from([0, 128, 4000, 45056, 120000]))
    def write_min_free(self, value: int) -> None:
        self.m.write("/proc/sys/vm/min_free_kbytes", str(value))
        self.twin.vm.min_free_kbytes = self.twin.vm.user_min_free_kbytes = value
        setup_per_zone_wmarks(self.twin)

    @precondition(lambda self: self.disabled is None)
    @rule(scale=st.sampled_from([1, 10, 150, 3000]), boost=st.sampled_from([0, 1, 15000, 40000]))
    def write_factors(self, scale: int, boost: int) -> None:
        self.m.write("/proc/sys/vm/watermark_scale_factor", str(scale))
        self.m.write("/proc/sys/vm/watermark_boost_factor", str(boost))
        self.twin.vm.watermark_scale_factor = scale
        self.twin.vm.watermark_boost_factor = boost
        setup_per_zone_wmarks(self.twin)

    @precondition(lambda self: self.disabled is None)
    @rule(value=st.sampled_from([0, 8, 100, 3000]))
    def write_fraction(self, value: int) -> None:
        self.m.write("/proc/sys/vm/percpu_pagelist_high_fraction", str(value))
        self.twin.vm.percpu_pagelist_high_fraction = value
        for zone in self.twin.zones:
            if zone.present:
                set_pageset(self.twin, zone)

    @rule(values=st.lists(st.sampled_from([0, 1, 32, 256]), min_size=5, max_size=5))
    def write_reserve_ratios(self, values: list[int]) -> None:
        self.m.write("/proc/sys/vm/lowmem_reserve_ratio", " ".join(map(str, values)))
        self.twin.vm.lowmem_reserve_ratio = values
        setup_lowmem_reserve(self.twin)

    @invariant()
    def same(self) -> None:
        assert_same(self.m, self.twin)

    def teardown(self) -> None:
        if self.disabled is not None:
            self.pcp_enable()
        self.m.validate()


TestAllocatorAgainstTwin = AllocatorAgainstTwin.TestCase
TestAllocatorAgainstTwin.settings = settings(
    max_examples=100,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
