"""Random reading, writing, writing back and scanning, compared with a readable twin."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kmm import Machine, _filemap
from kmm._vmscan import reclaim_state, set_reclaim_state, shrink_lists
from kmm.gfp import GFP_KERNEL
from kmm.memory import User
from kmm.params import (
    PG_ACTIVE,
    PG_DIRTY,
    PG_PINNED,
    PG_REFERENCED,
    PG_WRITEBACK,
    SLOT_PFN,
    SLOT_PRESENT,
    SLOT_YOUNG,
)
from kmm.vmscan import PGDAT_DIRTY, ScanControl
from kmm.vmstat import all_vm_events
from tests.conftest import two_nodes
from tests.reference.lru_twin import LruTwin, Page, Scan
from tests.tampering import writable

SLOT_RECLAIM = 1 << 59
USERS = ("anon", "shmem", "file", "mapped")
PAGES = 700
COUNTED = "pgactivate pgdeactivate pgrefill pgrotated pswpout".split()
COUNTED += "pgscan_anon pgscan_file pgsteal_anon pgsteal_file".split()
_FLAGS = {PG_REFERENCED: "referenced", PG_DIRTY: "dirty", PG_WRITEBACK: "writeback"}
_FLAGS[PG_PINNED] = "pinned"


class LruAgainstTwin(RuleBasedStateMachine):
    """One node with pages in two zones; every list, mark and counter is compared."""

    m: Machine

    @initialize(
        swap=st.sampled_from([0, 300, 4000, 4000]),
        filled=st.integers(0, 15),
        clean=st.booleans(),
        read=st.integers(0, PAGES),
    )
    def start(self, swap: int, filled: int, clean: bool, read: int) -> None:
        m = self.m = two_nodes("memhp_default_state=online_movable")
        m.writeback_delay = 1
        if swap:
            m.swapon(4096 * (swap + 1))
        m.plug("a", 0, 0x100000000, 1 << 27)
        # So few pages of the Movable zone are left that others come from below.
        movable = m.nodes[0].zone(3)
        m.alloc_pages_bulk(movable.nr_free_pages - movable.low_wmark_pages() - 900, gfp=0x100CCA)
        self.users = {
            name: User(m, name, "file" if name == "mapped" else name, PAGES, tokens=True)
            for name in USERS
        }
        self.users["mapped"].engine.mapped = True
        self.held: dict[tuple[str, int], int] = {}
        self.twin = LruTwin(
            lambda: sum(z.nr_free_pages for z in m.nodes[0].zones),
            lambda: sum(z.high_wmark_pages() for z in m.nodes[0].zones if z.managed_pages),
            swap,
        )
        self.pages: dict[tuple[str, int], Page] = {}
        for i, name in enumerate(USERS):
            if filled >> i & 1:
                self.fill(name, clean, read)

    def fill(self, name: str, clean: bool, read: int) -> None:
        """Let many pages of a user be there, not touched lately, some of them active."""
        n = PAGES - 170 * USERS.index(name)
        self.touch(name, 0, n, True, 1)
        if clean and name in ("file", "mapped"):
            self.begin_to_write(name, PAGES)
            self.end_writing(name)
        if read:
            self.touch(name, 0, min(read, n), False, 2)
        writable(self.users[name].engine.slots)[:] &= ~np.uint64(SLOT_YOUNG)
        for index in range(n):
            self.pages[name, index].young = False

    @rule(
        name=st.sampled_from(USERS),
        start=st.integers(0, PAGES - 1),
        n=st.integers(1, 200),
        write=st.booleans(),
        times=st.integers(1, 2),
    )
    def touch(self, name: str, start: int, n: int, write: bool, times: int) -> None:
        n = min(n, PAGES - start)
        for _ in range(times):
            user = self.users[name]
            before = user.engine.slots.copy()
            (_touch_write if write else _touch_read)(user, start, n)
            for index in range(start, start + n):
                self._twin_touch(user, index, bool(before[index] & np.uint64(SLOT_PRESENT)), write)
            if write:
                user.write_tokens(start, np.arange(start, start + n) + 1)
                self.held.update({(name, i): i + 1 for i in range(start, start + n)})
                for index in range(start, start + n):
                    self.pages[name, index].dirty = name != "anon"

    def _twin_touch(self, user: User, index: int, present: bool, write: bool) -> None:
        key = (user.name, index)
        if present:
            self.twin.touch(self.pages[key], write)
            return
        kind = "file" if user.name == "mapped" else user.name
        swapped = key in self.twin.swapped
        if kind != "file" and not swapped and not write:
            return
        zone = self.m.page_zone(int(user.engine.slots[index] & np.uint64(SLOT_PFN)))
        assert zone is not None
        page = Page(user.name, index, kind, zone.zone_idx, user.name == "mapped")
        page.dirty = kind == "shmem" or (write and kind == "file")
        tables = kind == "anon" or page.mapped
        page.young, page.referenced = tables, not tables and (not write or kind == "shmem")
        self.twin.swapped.discard(key)
        self.pages[key] = page
        self.twin.add(page)

    @rule(
        priority=st.sampled_from([0, 0, 1, 3, 6, 12]),
        reclaim_idx=st.sampled_from([1, 3]),
        swappiness=st.sampled_from([0, 1, 60, 200]),
        wanted=st.sampled_from([1, 32, 500, 1 << 40]),
        kswapd=st.booleans(),
        dirty=st.booleans(),
    )
    def scan(
        self,
        priority: int,
        reclaim_idx: int,
        swappiness: int,
        wanted: int,
        kswapd: bool,
        dirty: bool,
    ) -> None:
        failures, flags, _, _ = reclaim_state(self.m, 0)
        flags = flags | PGDAT_DIRTY if dirty else flags & ~PGDAT_DIRTY
        set_reclaim_state(self.m, 0, failures, flags)
        self.twin.write_dirty = dirty
        real = ScanControl(
            wanted,
            GFP_KERNEL,
            reclaim_idx,
            kswapd=kswapd,
            swappiness=swappiness,
            priority=priority,
        )
        mine = Scan(priority, reclaim_idx, swappiness, wanted, kswapd)
        self.twin.shrink_node(mine)
        shrink_lists(self.m, 0, real)
        assert (real.nr_scanned, real.nr_reclaimed) == (mine.scanned, mine.reclaimed)
        listed = {page.key for pages in self.twin.lists for page in pages}
        self.pages = {key: page for key, page in self.pages.items() if key in listed}

    @rule(name=st.sampled_from(["file", "mapped"]), n=st.integers(1, 300))
    def begin_to_write(self, name: str, n: int) -> None:
        user = self.users[name]
        _filemap.write_cache_pages(user.engine, self.m, 0, PAGES, n, False)
        for index in range(PAGES):
            page = self.pages.get((name, index))
            if page and page.dirty and not page.writeback and n > 0:
                page.dirty, page.writeback = False, True
                n -= 1

    @rule(name=st.sampled_from(["file", "mapped"]))
    def end_writing(self, name: str) -> None:
        _filemap.end_writeback(self.users[name].engine, self.m, 0, PAGES)
        for index in range(PAGES):
            page = self.pages.get((name, index))
            if page and page.writeback:
                if page.dirty:
                    page.writeback = page.reclaim = False
                else:
                    self.twin.written(page)

    @rule(name=st.sampled_from(USERS), start=st.integers(0, PAGES - 1), n=st.integers(1, 100))
    def let_go(self, name: str, start: int, n: int) -> None:
        n = min(n, PAGES - start)
        self.users[name].release(start, n)
        for index in range(start, start + n):
            self.held.pop((name, index), None)
            self.twin.swapped.discard((name, index))
            page = self.pages.pop((name, index), None)
            if page is not None:
                self.twin.lists[self.twin.list_of(page) or 0].remove(page)

    @rule(name=st.sampled_from(USERS), index=st.integers(0, PAGES - 1))
    def pin(self, name: str, index: int) -> None:
        page = self.pages.get((name, index))
        if page is not None:
            slot = self.users[name].engine.slots[index]
            self.m.memmap["flags"][slot & np.uint64(SLOT_PFN)] ^= PG_PINNED
            page.pinned = not page.pinned

    @invariant()
    def same(self) -> None:
        if not hasattr(self, "twin"):
            return
        for lru, pages in enumerate(self.twin.lists):
            assert self.m.memmap_engine.node_stat(0)[lru] == len(pages)
            for page in pages:
                self._same_page(page, bool(lru % 2))
        events = all_vm_events(self.m)
        assert {k: events[k] for k in COUNTED} == {k: self.twin.events.get(k, 0) for k in COUNTED}
        assert reclaim_state(self.m, 0)[2:] == tuple(self.twin.cost)

    def _same_page(self, page: Page, active: bool) -> None:
        slot = self.users[page.user].engine.slots[page.index]
        flags = int(self.m.memmap["flags"][slot & np.uint64(SLOT_PFN)])
        have: dict[str, Any] = {name: bool(flags & bit) for bit, name in _FLAGS.items()}
        have |= {
            "active": bool(flags & PG_ACTIVE),
            "young": bool(slot & np.uint64(SLOT_YOUNG)),
            "reclaim": bool(slot & np.uint64(SLOT_RECLAIM)),
        }
        want = {name: getattr(page, name) for name in (*_FLAGS.values(), "young", "reclaim")}
        assert have == want | {"active": active}, page

    def teardown(self) -> None:
        if not hasattr(self, "twin"):
            return
        for name, user in self.users.items():
            mine = sorted(k for k in self.held if k[0] == name)
            got = user.read_tokens(0, PAGES)
            assert [int(got[i]) for _, i in mine] == [self.held[k] for k in mine]
        self.m.validate()


def _touch_read(user: User, start: int, n: int) -> None:
    _filemap.touch(user.engine, user.m, start, n, False, user.gfp, 0, 1, 0)


def _touch_write(user: User, start: int, n: int) -> None:
    _filemap.touch(user.engine, user.m, start, n, True, user.gfp, 0, 1, 0)


TestLruAgainstTwin = LruAgainstTwin.TestCase
TestLruAgainstTwin.settings = settings(
    max_examples=40,
    stateful_step_count=12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
