"""Users of pages against their readable twin: slots, lists, marks, counters, what pages hold."""

from __future__ import annotations

import itertools
import random

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kmm import _migrate
from kmm.memory import User
from kmm.mempolicy import DEFAULT_POLICY, MemPolicy, new_policy
from kmm.migrate import MigrationTarget, migrate_pages
from kmm.params import (
    PG_ACTIVE,
    PG_DIRTY,
    PG_MLOCKED,
    PG_PINNED,
    PG_REFERENCED,
    SLOT_HUGE,
    SLOT_PFN,
    SLOT_PRESENT,
)
from kmm.used_pages import LRU_NAMES, NR_LRU_LISTS, live_entries, used_pages
from kmm.vmstat import node_items
from tests.reference.compare import assert_same
from tests.reference.hotplug_twin import TwinMachine
from tests.reference.users_twin import GFP_OF_KIND, ON_LISTS, Place, TwinUser, TwinUsers
from tests.three_nodes import BLOCKS, build, set_state

MARKS = {
    "active": PG_ACTIVE,
    "dirty": PG_DIRTY,
    "mlocked": PG_MLOCKED,
    "pinned": PG_PINNED,
    "referenced": PG_REFERENCED,
}
MOST_PAGES = 9000  # of all users: there is always memory, so nothing has to be waited for
MOVE = 0x1024C0 | 0x8 | 0x40000 | 0x4000  # what pages that leave a block are moved with


class UsersAgainstTwin(RuleBasedStateMachine):
    """Random users on three nodes, who come, touch, let go, move and end."""

    def __init__(self) -> None:
        super().__init__()
        self.m = build()
        self.names = (f"user{i}" for i in range(1000))

    @initialize(how=st.lists(st.sampled_from(["kernel", "movable"]), min_size=3, max_size=3))
    def start(self, how: list[str]) -> None:
        for first, word in zip(BLOCKS[::2], how, strict=True):
            set_state(self.m, first, f"online_{word}")
        self.allocator = TwinMachine.of(self.m)
        self.twin = TwinUsers(self.allocator)

    def _pick(self, seed: int) -> tuple[User, TwinUser]:
        name = random.Random(seed).choice(sorted(self.twin.users))
        return self.m.users[name], self.twin.users[name]

    # -- users come and end -----------------------------------------------------------------

    def _policy(self, kind: str, mode: str, nodes: set[int], cpu: int) -> tuple[MemPolicy, Place]:
        here, ordered = self.m.node_of_cpu(cpu), sorted(nodes)
        if mode == "bind":
            # Nodes that have Movable memory alone cannot serve the kernel itself.
            movable = GFP_OF_KIND[kind] & 0xA == 0xA
            mask = nodes if movable or nodes & self.m.n_normal_memory else None
            return new_policy(self.m, mode, nodes), lambda index: (here, mask)
        if mode == "interleave":
            policy = new_policy(self.m, mode, nodes)
            if kind in ("anon", "shmem"):
                return policy, lambda index: (ordered[index % len(ordered)], None)
            turns = itertools.cycle(ordered)
            return policy, lambda index: (next(turns), None)
        return DEFAULT_POLICY, lambda index: (here, None)

    @precondition(lambda self: len(self.twin.users) < 8)
    @rule(
        kind=st.sampled_from(["anon", *ON_LISTS, *ON_LISTS, *GFP_OF_KIND]),
        pages=st.integers(0, 2500),
        mode=st.sampled_from(["default", "default", "bind", "interleave"]),
        nodes=st.sets(st.integers(0, 2), min_size=1),
        cpu=st.integers(0, 2),
        order=st.sampled_from([0, 0, 1, 3, 9]),
        thp=st.sampled_from(["never", "always", "madvise"]),
        tokens=st.booleans(),
        locked=st.booleans(),
        mapped=st.booleans(),
        touched=st.floats(0, 1),
    )
    def create(
        self, kind: str, pages: int, mode: str, nodes: set[int], cpu: int, order: int,
        thp: str, tokens: bool, locked: bool, mapped: bool, touched: float,
    ) -> None:  # fmt: skip
        policy, place = self._policy(kind, mode, nodes, cpu)
        order = 0 if kind in (*ON_LISTS, "driver_movable") else order
        thp = thp if kind == "anon" else "never"
        mine = TwinUser(next(self.names), kind, pages >> order, place, order, thp)
        mine.cpu, mine.interleave = cpu, mode == "interleave"
        user = User(
            self.m, mine.name, kind, mine.size, policy=policy, cpu=cpu, order=order,
            tokens=tokens, thp=thp,
        )  # fmt: skip
        mine.locked = user.engine.locked = locked and kind in ON_LISTS
        mine.mapped = user.engine.mapped = mapped and kind in ("shmem", "file")
        self.twin.users[mine.name] = mine
        self._touch(user, mine, 0, int(touched * mine.size), pages)

    @precondition(lambda self: self.twin.users)
    @rule(seed=st.integers(0, 2**16))
    def close(self, seed: int) -> None:
        user, mine = self._pick(seed)
        self.twin.release(mine, 0, mine.size)
        user.close()
        del self.twin.users[mine.name]

    @precondition(lambda self: self.twin.users)
    @rule(seed=st.integers(0, 2**16), by=st.integers(-600, 600))
    def resize(self, seed: int, by: int) -> None:
        user, mine = self._pick(seed)
        size = max(0, mine.size + by)
        if size < mine.size:
            gone = self.twin.release(mine, size, mine.size - size)
            assert user.release(size, mine.size - size) == gone
        user.engine.resize(size)
        mine.size = size

    # -- pages come and go -------------------------------------------------------------------

    @precondition(lambda self: self.twin.users)
    @rule(
        seed=st.integers(0, 2**16),
        start=st.floats(0, 1),
        n=st.sampled_from([1, 15, 70, 512, 600, 1200, 2500]),
        whole=st.booleans(),
    )
    def fault(self, seed: int, start: float, n: int, whole: bool) -> None:
        user, mine = self._pick(seed)
        first = int(start * mine.size)
        self._touch(user, mine, first - (first % 512 if whole else 0), n, seed)

    def _touch(self, user: User, mine: TwinUser, first: int, n: int, seed: int) -> None:
        """Let a user touch so many pages, if there are, and write to them."""
        held = sum(1 << page.order for page in self.twin.pages.values())
        n = min(n, mine.size - first, max(0, MOST_PAGES - held) >> mine.order)
        before = len(mine.slots)
        self.twin.fault(mine, first, n)
        assert user.fault(first, n) == len(mine.slots) - before
        if user.engine.tokens:
            tokens = np.arange(first, first + n, dtype=np.uint64) * 1000 + seed
            user.write_tokens(first, tokens)
            mine.tokens.update(zip(range(first, first + n), tokens.tolist(), strict=True))

    @precondition(lambda self: self.twin.users)
    @rule(seed=st.integers(0, 2**16), start=st.floats(0, 1), share=st.floats(0, 1))
    def release(self, seed: int, start: float, share: float) -> None:
        user, mine = self._pick(seed)
        first = int(start * mine.size)
        n = int(share * (mine.size - first))
        assert user.release(first, n) == self.twin.release(mine, first, n)

    @precondition(lambda self: any(p.huge for p in self.twin.pages.values()))
    @rule(seed=st.integers(0, 2**16))
    def split(self, seed: int) -> None:
        heads = sorted(p for p, page in self.twin.pages.items() if page.huge)
        head = random.Random(seed).choice(heads)
        page = self.twin.pages[head]
        user = self.m.users[page.user.name]
        assert user.engine.split(self.m, page.index + seed % 512)
        self.twin.split(head)
        assert not user.engine.split(self.m, page.index + seed % 512)

    # -- pages move ---------------------------------------------------------------------------

    def _range(self, seed: int, length: int) -> tuple[int, int]:
        """Some pages from one that is used on."""
        start = random.Random(seed).choice(sorted(self.twin.pages))
        start -= start % 512 if seed % 2 else 0
        return start, start + length

    def _isolate(self, start: int, end: int) -> np.ndarray:
        out, refused = np.zeros(end - start, np.uint64), np.zeros(4, np.uint64)
        n, _ = _migrate.isolate_range(self.m.memmap_engine, start, end, out, refused)
        return out[:n]

    @precondition(lambda self: self.twin.pages)
    @rule(seed=st.integers(0, 2**16), length=st.sampled_from([1, 60, 700, 3000]))
    def isolate_and_put_back(self, seed: int, length: int) -> None:
        start, end = self._range(seed, length)
        pfns, mine = self._isolate(start, end), self.twin.isolate(start, end)
        assert pfns.tolist() == mine
        _migrate.putback_movable_pages(self.m.memmap_engine, pfns[::-1].copy())
        self.twin.putback(mine[::-1])

    @precondition(lambda self: self.twin.pages)
    @rule(
        seed=st.integers(0, 2**16),
        length=st.sampled_from([1, 60, 700, 3000]),
        nid=st.integers(0, 2),
        nodes=st.sets(st.integers(0, 2), min_size=1),
        highmem=st.booleans(),
        split=st.booleans(),
    )
    def migrate(
        self, seed: int, length: int, nid: int, nodes: set[int], highmem: bool, split: bool
    ) -> None:
        # The machine's first node has pages for whatever is not movable enough for the others.
        nodes = nodes | {0}
        start, end = self._range(seed, length)
        pfns, mine = self._isolate(start, end), self.twin.isolate(start, end)
        huge = [p for p in mine if self.twin.pages[p].huge]
        if split and huge:
            _migrate.split_isolated(self.m, huge[0])
            self.twin.split(huge[0])
            at = mine.index(huge[0])
            mine[at : at + 1] = range(huge[0], huge[0] + 512)
            pfns = np.array(mine, dtype=np.uint64)
        gfp = MOVE | 0x2 * highmem
        target = MigrationTarget(gfp, nid, tuple(sorted(nodes)))
        left = self.twin.migrate(mine, gfp, nid, nodes, 0)
        assert migrate_pages(self.m, pfns, target).left.tolist() == left

    @precondition(lambda self: self.twin.pages)
    @rule(seed=st.integers(0, 2**16), n=st.integers(1, 40))
    def pin(self, seed: int, n: int) -> None:
        """Hold some single pages for long, or let them loose if they were held."""
        single = [p for p, page in self.twin.pages.items() if page.user.kind in ON_LISTS]
        single = sorted(p for p in single if not self.twin.pages[p].huge)
        for pfn in random.Random(seed).sample(single, min(n, len(single))):
            flags = int(self.m.memmap["flags"][pfn])
            self.m.memmap_engine.set_page_flags(pfn, flags ^ PG_PINNED)
            self.twin.pages[pfn].marks ^= {"pinned"}

    # -- what has to be the same ----------------------------------------------------------------

    @invariant()
    def same(self) -> None:
        assert_same(self.m, self.allocator)
        for name, mine in self.twin.users.items():
            self._same_user(self.m.users[name], mine)
        self._same_lists()
        for nid, pgdat in self.m.nodes.items():
            have, want = node_items(self.m, pgdat), self.twin.counters(nid)
            for item in want:
                assert have[item] == want[item] + pgdat.vmstat.get(item, 0), (nid, item)
        self.m.validate()

    def _same_user(self, user: User, mine: TwinUser) -> None:
        assert user.nr_present == len(mine.slots)
        there = np.flatnonzero(user.engine.slots)
        values = user.engine.slots[there]
        assert (values & np.uint64(SLOT_PRESENT)).all()
        pfns = (values & np.uint64(SLOT_PFN)).tolist()
        assert dict(zip(there.tolist(), pfns, strict=True)) == mine.slots
        huge = set(there[values & np.uint64(SLOT_HUGE) != 0].tolist())
        assert huge == {i for i, pfn in mine.slots.items() if pfn not in self.twin.pages} | {
            i for i, pfn in mine.slots.items() if pfn in self.twin.pages and i in huge
            and self.twin.pages[pfn].huge
        }  # fmt: skip
        if mine.tokens:
            held = user.read_tokens(0, user.pages)
            assert {i: int(held[i]) for i in mine.tokens} == mine.tokens

    def _same_lists(self) -> None:
        pages, _ = used_pages(self.m)
        assert pages.pfn.tolist() == sorted(self.twin.pages)
        for nid in self.m.nodes:
            for lru in range(NR_LRU_LISTS):
                at, _ = live_entries(self.m, pages, nid, lru)
                want = self.twin.lru.get((nid, LRU_NAMES[lru]), [])
                assert pages.pfn[at].tolist() == want, (nid, lru)
        for name, mark in MARKS.items():
            bearing = pages.pfn[pages.flags & mark != 0].tolist()
            assert bearing == [p for p in pages.pfn.tolist() if name in self.twin.pages[p].marks]

    def teardown(self) -> None:
        if hasattr(self, "twin"):
            for user in list(self.m.users.values()):
                user.close()
            self.m.validate()


TestUsersAgainstTwin = UsersAgainstTwin.TestCase
TestUsersAgainstTwin.settings = settings(
    max_examples=20,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
