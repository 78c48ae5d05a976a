"""Users of pages: anonymous spaces, files, caches of the kernel (mm/memory.c, mm/filemap.c).

A user has a name, by which messages, ``kmm why`` and scenarios call it, and maps an index to a
page.  What the engine can do at once it does for a whole range (``_memory``); here is what
a request has to wait for, and what kinds of users differ in.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kmm import _filemap
from kmm._memory import PageUser
from kmm.arguments import check_tokens
from kmm.cpuset import CpuSet, detach
from kmm.errors import OutOfMemory, check_number, check_text, kernel_error
from kmm.filemap import access
from kmm.gfp import (
    __GFP_COMP,
    __GFP_NORETRY,
    __GFP_RECLAIMABLE,
    __GFP_THISNODE,
    __GFP_ZERO,
    GFP_HIGHUSER_MOVABLE,
    GFP_KERNEL,
    GFP_TRANSHUGE,
    GFP_TRANSHUGE_LIGHT,
    gfp_zone,
)
from kmm.mempolicy import (
    DEFAULT_POLICY,
    MemPolicy,
    Placement,
    check_policy,
    fault_interleaved,
    interleave_nodes,
    mask_of,
    place,
)
from kmm.page_alloc import __alloc_pages, __free_pages
from kmm.params import (
    NR_PAGES_MAX,
    PAGEBLOCK_NR_PAGES,
    PAGEBLOCK_ORDER,
    PG_ACTIVE,
    PG_DIRTY,
    PG_MLOCKED,
    PG_OFFLINE,
    PG_PINNED,
    PG_REFERENCED,
    PG_WRITEBACK,
    USER_ANON,
    USER_FILE,
    USER_HUGETLB,
    USER_KERNEL,
    USER_MOVABLE_OPS,
    USER_OFFLINE,
    USER_PAGE_TABLE,
    USER_SHMEM,
    USER_SLAB_RECLAIMABLE,
    USER_SLAB_UNRECLAIMABLE,
    USER_STACK,
)
from kmm.shrinker import Shrinker

if TYPE_CHECKING:
    from kmm.machine import Machine

#: Names of kinds, as scenarios and messages have them.
KIND_NAMES = {
    USER_ANON: "anon",
    USER_SHMEM: "shmem",
    USER_FILE: "file",
    USER_SLAB_RECLAIMABLE: "slab_reclaimable",
    USER_SLAB_UNRECLAIMABLE: "slab",
    USER_STACK: "stack",
    USER_PAGE_TABLE: "page_table",
    USER_KERNEL: "kernel",
    USER_MOVABLE_OPS: "driver_movable",
    USER_OFFLINE: "offline",
    USER_HUGETLB: "hugetlb",
}
#: Those that a User can be of; huge pages of a pool have users of their own (hugetlbfs).
KINDS = {name: kind for kind, name in KIND_NAMES.items() if kind != USER_HUGETLB}

_GFP_OF_KIND = {
    USER_ANON: GFP_HIGHUSER_MOVABLE | __GFP_COMP | __GFP_ZERO,
    USER_SHMEM: GFP_HIGHUSER_MOVABLE | __GFP_COMP,
    USER_FILE: GFP_HIGHUSER_MOVABLE | __GFP_COMP,
    USER_SLAB_RECLAIMABLE: GFP_KERNEL | __GFP_RECLAIMABLE | __GFP_COMP,
    USER_SLAB_UNRECLAIMABLE: GFP_KERNEL | __GFP_COMP,
    USER_STACK: GFP_KERNEL | __GFP_ZERO,
    USER_PAGE_TABLE: GFP_KERNEL | __GFP_ZERO,
    USER_KERNEL: GFP_KERNEL,
    USER_MOVABLE_OPS: GFP_HIGHUSER_MOVABLE,
    USER_OFFLINE: GFP_HIGHUSER_MOVABLE,
}
_NEAR = __GFP_THISNODE | __GFP_NORETRY
THP_CHOICES = ("never", "always", "madvise")
#: Kinds whose pages come one by one: those on LRU lists, and those that drivers move.
SINGLE_PAGES = frozenset((USER_ANON, USER_SHMEM, USER_FILE, USER_MOVABLE_OPS))
_MARKS_OF_NEW_PAGES = PG_ACTIVE | PG_REFERENCED | PG_DIRTY | PG_WRITEBACK | PG_MLOCKED | PG_PINNED
_MARKS_OF_NEW_PAGES |= PG_OFFLINE  # of a balloon's, which it can move
_SLOTS_AT_ONCE = 1 << 16


class User:
    """Something that uses pages (a task's address space, a file, a cache of the kernel).

    :param name: unique on its machine; kind: one of KINDS.
    :param pages: how many it can have; in blocks of the order, for caches of larger blocks.
    :param policy: which nodes give it memory; cpu: which CPU touches it, ``m.this_cpu`` if None.
    :param order: of each block: 0 for what is on LRU lists, 0 to 10 for the kernel's own.
    :param tokens: whether pages carry a token each, as their content.
    :param thp: whether 512 absent pages in a row get a block of order 9: ``never``, ``always``
        if there is one at once, ``madvise`` also if it has to be waited for.
    :raises InvalidArgument: naming the argument, its value and what is allowed.
    """

    cpuset: CpuSet | None = None  # the top one
    interleave_offset = 0  # of its first page in what interleaving counts
    il_prev = -1  # the node that last had its turn, where the task counts

    def __init__(
        self,
        m: Machine,
        name: str,
        kind: str,
        pages: int,
        *,
        policy: MemPolicy = DEFAULT_POLICY,
        cpu: int | None = None,
        order: int = 0,
        tokens: bool = False,
        thp: str = "never",
    ) -> None:
        check_text("name", name)
        if not name or name in m.users:
            raise kernel_error(-22, f"name: {name!r}; allowed: a name that no other user has")
        if kind not in KINDS:
            raise kernel_error(-22, f"kind: {kind!r}; allowed: {', '.join(KINDS)}")
        if thp not in THP_CHOICES:
            raise kernel_error(-22, f"thp: {thp!r}; allowed: {', '.join(THP_CHOICES)}")
        check_number("pages", pages, 0, NR_PAGES_MAX)
        if thp != "never" and KINDS[kind] not in (USER_ANON, USER_SHMEM, USER_FILE):
            raise kernel_error(-22, f"thp: {thp!r}; allowed: 'never' for pages of kind {kind!r}")
        check_number("order", order, 0, 0 if KINDS[kind] in SINGLE_PAGES else 10)
        self.m, self.name, self.kind = m, name, KINDS[kind]
        self.cpu = m.this_cpu if cpu is None else check_number("cpu", cpu, 0, m.nr_cpus - 1)
        self._policy, self.thp = check_policy(m, policy), thp
        self.gfp = _GFP_OF_KIND[self.kind]
        try:
            self.engine = PageUser(m.memmap_engine, self.kind, pages, order, tokens)
        except MemoryError as e:
            raise kernel_error(-12, f"{name!r}: {e or 'no room for its table'}") from None
        m.users[name] = self
        m.users_by_number[self.engine.number] = self
        self._prepare_reclaim()

    def _prepare_reclaim(self) -> None:
        #: Of a task: from -1000, never killed for its memory, to 1000.
        self.oom_score_adj = 0
        self.killed = False  # for its memory; it comes no more
        self.dirtied_when: int | None = None  # ns of the clock; None while it is clean
        self.writeback_index = 0
        self._shrinker: Shrinker | None = None
        if self.kind == USER_SLAB_RECLAIMABLE:
            self.shrinker = Shrinker()

    @property
    def policy(self) -> MemPolicy:
        """Which nodes give it memory."""
        return self._policy

    @policy.setter
    def policy(self, value: MemPolicy) -> None:
        self._policy = check_policy(self.m, value)

    @property
    def shrinker(self) -> Shrinker | None:
        """What gives a cache's blocks back when memory is short, None if nothing does."""
        return self._shrinker

    @shrinker.setter
    def shrinker(self, value: Shrinker | None) -> None:
        self._check_open()
        if value is not None and self.kind == USER_HUGETLB:
            # It would give blocks back behind the pool's back.
            raise kernel_error(-22, "shrinker: of huge pages; allowed: None, a pool has none")
        self._shrinker = value
        self.m.shrinkers.pop(self.name, None)
        if value is not None:
            self.m.shrinkers[self.name] = self

    def __repr__(self) -> str:
        return f"<{KIND_NAMES[self.kind]} {self.name}: {self.nr_present} of {self.pages} pages>"

    @property
    def pages(self) -> int:
        """How many pages, or blocks of its order, it can have."""
        return self.engine.nr_slots

    @property
    def nr_present(self) -> int:
        """How many pages, or blocks, are in memory."""
        return self.engine.nr_present

    @property
    def mems(self) -> frozenset[int] | None:
        """The nodes that its cpuset lets it use, None for all."""
        return None if self.cpuset is None else self.cpuset.effective_mems

    def placement(self, index: int) -> Placement:
        """Return where the next page goes, which is that of an index."""
        # By what pages of its kind usually are, even where one is requested that has to stay.
        usual = _GFP_OF_KIND.get(self.kind, self.gfp)
        zone_idx, offset = gfp_zone(usual), index + self.interleave_offset
        if self.policy.mode == "interleave" and self.kind not in (USER_ANON, USER_SHMEM):
            offset = self.policy.nodes.index(interleave_nodes(self.policy, self.il_prev))
        return place(self.m, self.policy, self.cpu, offset, self.mems, zone_idx)

    # -- pages come ---------------------------------------------------------------------

    def fault(self, start: int, n: int, flags: int = 0) -> int:
        """Touch a range of pages, first to last; those that are absent are allocated.

        :param start: first index; n: pages; flags: PG_* marks of new pages; with PG_DIRTY those of
            a file that are there already are written too.
        :return: how many were absent.
        :raises OutOfMemory: when there is none for the next; those before it stay.
        """
        start, n = self._check_range(start, n)
        self._check_alive()
        self._check_marks(flags)
        if self.kind == USER_SHMEM and not self.engine.mapped:
            # Written by a call, which leaves its traces at once.
            flags |= PG_DIRTY | PG_REFERENCED
        if self.kind == USER_ANON and self.engine.locked:
            flags |= PG_REFERENCED
        if self.kind == USER_FILE and flags & PG_DIRTY:
            _filemap.write_present(self.engine, self.m, start, n)
        before = self.engine.nr_came
        at, end = start, start + n
        while at < end:
            at += self._fault_some(at, end, flags)
        return self.engine.nr_came - before

    def _fault_some(self, at: int, end: int, flags: int) -> int:
        """Touch some pages from one on; how many."""
        huge = self._fault_huge(at, end, flags)
        if huge:
            return huge
        where = self.placement(at)
        n = self._run_of_small(at, end) - at
        if self.policy.mode == "interleave":
            done = fault_interleaved(self, at, n, flags)
        else:
            done = self.engine.fault_in(
                self.m, at, n, self.gfp, where.nid, mask_of(where), self.cpu, flags
            )
        self.m.run_kswapds()
        if done == 0:
            self._fault_slowly(at, self.placement(at), flags)
            done = 1
        return done

    def _fault_huge(self, at: int, end: int, flags: int) -> int:
        """Give 512 absent pages a block of order 9, if they may have one; how many pages it has."""
        if self.thp == "never" or at % PAGEBLOCK_NR_PAGES or at + PAGEBLOCK_NR_PAGES > end:
            return 0
        if self.engine.slots[at : at + PAGEBLOCK_NR_PAGES].any():
            return 0
        interleave = self.policy.mode == "interleave"
        where = self.placement(at // PAGEBLOCK_NR_PAGES if interleave else at)
        gfp, got = GFP_TRANSHUGE if self.thp == "madvise" else GFP_TRANSHUGE_LIGHT, False
        # A huge page elsewhere is worth less than small ones near: first the nearest node alone.
        near_first = not interleave and mask_of(where) >> where.nid & 1
        if near_first:
            got = self._try_huge(at, gfp | _NEAR, where, flags)
        if not got and (not near_first or self.thp == "madvise"):
            got = self._try_huge(at, gfp, where, flags)
        if not got and self.thp == "madvise":
            got = self._wait_for_huge(at, where, gfp, flags)
        self.m.count_vm_event("thp_fault_alloc" if got else "thp_fault_fallback")
        return PAGEBLOCK_NR_PAGES if got else 0

    def _try_huge(self, at: int, gfp: int, where: Placement, flags: int) -> bool:
        return self.engine.fault_in_huge(
            self.m, at, gfp, where.nid, mask_of(where), self.cpu, flags
        )

    def _wait_for_huge(self, at: int, where: Placement, gfp: int, flags: int) -> bool:
        """Have a block of order 9 made for 512 absent pages; whether that worked."""
        try:
            pfn = _alloc_pages_of(self.m, gfp, PAGEBLOCK_ORDER, where.nid, where.nodemask, self.cpu)
        except OutOfMemory:
            return False
        self.engine.attach_huge(self.m, at, pfn, flags)
        return True

    def _run_of_small(self, at: int, end: int) -> int:
        """Where the run of pages ends that are touched one by one."""
        if self.thp == "never":
            return end
        return min(end, (at // PAGEBLOCK_NR_PAGES + 1) * PAGEBLOCK_NR_PAGES)

    def _fault_slowly(self, index: int, where: Placement, flags: int) -> None:
        """Bring one page in that has to be waited for, or read from the swap device."""
        pfn = self.wait_for_page(index, where)
        if self.engine.slots[index]:
            _filemap.bring_in(self.engine, self.m, index, pfn, bool(flags & PG_DIRTY))
        else:
            self.engine.attach(self.m, index, pfn, flags)

    def wait_for_page(self, index: int, where: Placement | None = None) -> int:
        """Allocate a page for an index, waiting for memory if need be; its pfn.

        :param where: from where it may come, as the policy says if None.
        :raises OutOfMemory: when there is none, or the task was killed for its memory.
        """
        index, _ = self._check_range(index, 1)
        m, order = self.m, self.engine.order
        where = self.placement(index) if where is None else where
        before, m.current = m.current, self
        try:
            pfn = _alloc_pages_of(m, self.gfp, order, where.nid, where.nodemask, self.cpu)
        except OutOfMemory:
            # Rather than have none, the kernel for itself looks beyond a cpuset's nodes.
            if self.cpuset is None or self.kind < USER_SLAB_RECLAIMABLE:
                raise
            pfn = _alloc_pages_of(m, self.gfp, order, where.nid, None, self.cpu)
        finally:
            m.current = before
        if self.policy.mode == "interleave":
            self.il_prev = where.nid
        if self.killed:
            _free_pages_of(m, pfn, order, self.cpu)
        self._check_alive()
        return pfn

    def _check_marks(self, flags: int) -> None:
        if check_number("flags", flags, 0, (1 << 16) - 1) & ~_MARKS_OF_NEW_PAGES:
            raise kernel_error(
                -22, f"flags: {flags:#x}; allowed: marks out of {_MARKS_OF_NEW_PAGES:#x}"
            )

    def _check_alive(self) -> None:
        if self.killed:
            raise kernel_error(-12, f"{self.name!r} was killed, as there was no memory left")

    def read(self, start: int, n: int) -> int:
        """Read a range of pages, first to last; those not in memory come from where they are.

        What a file, shmem or an anonymous space never had content for stays absent but for a
        file's, which its backing store has.

        :return: how many pages came.
        :raises OutOfMemory: when there is no memory for the next; those before it are read.
        """
        start, n = self._check_access(start, n)
        return access(self, start, n, False)

    def write(self, start: int, n: int) -> int:
        """Write a range of pages, first to last, each of them whole.

        A file's pages are dirty then; above the limits of dirty pages they are written back.

        :return: how many pages came.
        :raises OutOfMemory: as read.
        """
        start, n = self._check_access(start, n)
        return access(self, start, n, True)

    def _check_access(self, start: int, n: int) -> tuple[int, int]:
        start, n = self._check_range(start, n)
        self._check_alive()
        if self.kind not in (USER_ANON, USER_SHMEM, USER_FILE):
            raise kernel_error(-22, f"kind: {KIND_NAMES[self.kind]!r}; allowed: anon, shmem, file")
        return start, n

    # -- pages go -----------------------------------------------------------------------

    def release(self, start: int, n: int) -> int:
        """Let the pages of a range go, first to last; returns how many were freed."""
        start, n = self._check_range(start, n)
        freed = self.engine.let_go(self.m, start, n, self.cpu)
        self.m.give_back_records()
        return freed

    def grow(self, n: int) -> int:
        """Touch n pages behind the last one there is, or as many as it can have.

        :return: how many came.
        :raises OutOfMemory: as fault.
        """
        self._check_open()
        n = check_number("n", n, 0, NR_PAGES_MAX)
        start = self.last_slot() + 1
        return self.fault(start, min(n, self.pages - start))

    def shrink(self, n: int) -> int:
        """Let the last n pages go, or all if there are fewer; returns how many were freed."""
        self._check_open()
        n = check_number("n", n, 0, NR_PAGES_MAX)
        end = self.last_slot() + 1
        return self.release(max(end - n, 0), min(n, end))

    def close(self) -> None:
        """Let everything go, and be no user any more."""
        self.release(0, self.pages)
        self.shrinker = None
        detach(self)
        del self.m.users[self.name]
        del self.m.users_by_number[self.engine.number]
        self.engine.close()

    def last_slot(self) -> int:
        """Return the last index that has something, in memory or swapped; -1 if none has."""
        slots = self.engine.slots
        # From the end, piece by piece: a space may be a thousand times what is used of it.
        for end in range(len(slots), 0, -_SLOTS_AT_ONCE):
            there = np.flatnonzero(slots[max(end - _SLOTS_AT_ONCE, 0) : end])
            if len(there):
                return max(end - _SLOTS_AT_ONCE, 0) + int(there[-1])
        return -1

    # -- what they hold -----------------------------------------------------------------

    def write_tokens(self, start: int, tokens: npt.ArrayLike) -> None:
        """Write a token into each page of a range, which all have to be in memory.

        :param start: first index; tokens: whole numbers from 0 to 2^64 - 1.
        :raises InvalidArgument: naming the argument, its value and what is allowed.
        """
        values = check_tokens("tokens", tokens)
        start, n = self._check_range(start, len(values))
        self._check_has_tokens()
        if self.engine.written is not None:
            raise kernel_error(-22, f"user {self.name!r}: what its pages hold follows from a seed")
        absent = np.flatnonzero(self.engine.pfns(start, n) < 0)
        if len(absent):
            raise kernel_error(
                -22, f"tokens: page {start + int(absent[0])} is absent; allowed: pages in memory"
            )
        self.engine.write_tokens(start, values)

    def read_tokens(self, start: int, n: int) -> npt.NDArray[np.uint64]:
        """Return the tokens of a range, wherever they are: memory, swap device, backing store.

        :raises InvalidArgument: naming the argument, its value and what is allowed.
        """
        start, n = self._check_range(start, n)
        self._check_has_tokens()
        return self.engine.read_tokens(start, n)

    def pfns(self, start: int = 0, n: int | None = None) -> npt.NDArray[np.int64]:
        """Return where the pages of a range are, -1 for those that are not in memory."""
        start = check_number("start", start, 0, self.pages)
        start, n = self._check_range(start, self.pages - start if n is None else n)
        return self.engine.pfns(start, n)

    def _check_has_tokens(self) -> None:
        if not self.engine.tokens:
            raise kernel_error(-22, f"user {self.name!r}: tokens: False; allowed: True")

    def _check_open(self) -> None:
        if self.m.users.get(self.name) is not self:
            raise kernel_error(-22, f"user {self.name!r}: is closed; allowed: one that is not")

    def _check_range(self, start: int, n: int) -> tuple[int, int]:
        self._check_open()
        first = check_number("start", start, 0, self.pages)
        return first, check_number("n", n, 0, self.pages - first)


def seed_of(name: str) -> int:
    """Return the seed from which the tokens of a user of this name follow (PageUser.sow)."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") | 1


# A class body would mangle the leading underscores.
_alloc_pages_of = __alloc_pages
_free_pages_of = __free_pages
