"""Users of huge pages: mappings and files that reserve them and touch them (fs/hugetlbfs)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kmm._memory import PageUser
from kmm.errors import check_number, check_text, kernel_error
from kmm.gfp import gfp_zone
from kmm.hugetlb import HState, free_huge_page
from kmm.hugetlb_move import flags_of
from kmm.hugetlb_pool import alloc_huge_page, hugetlb_acct_memory
from kmm.memory import User
from kmm.mempolicy import DEFAULT_POLICY, MemPolicy, Placement, place
from kmm.params import NR_PAGES_MAX, PG_ACTIVE, PG_PINNED, USER_HUGETLB

if TYPE_CHECKING:
    from kmm.machine import Machine


def find_hstate(m: Machine, size: int) -> HState:
    """Return the pool of a size in bytes.

    :raises InvalidArgument: if the machine has no such pool.
    """
    for h in m.hstates:
        if h.size == size:
            return h
    sizes = ", ".join(str(h.size) for h in m.hstates)
    raise kernel_error(-22, f"size: {size!r}; allowed: {sizes}")


class HugetlbUser(User):
    """A private mapping of huge pages, or a file of them.

    :param name: unique on its machine; pages: how many huge pages it spans.
    :param size: bytes of one, that of the default pool if None.
    :param policy: which nodes give them; cpu: which CPU touches them, ``m.this_cpu`` if None.
    :param reserve: whether they are reserved before they are touched, so that touching one
        fails only if the policy's nodes have none; False is MAP_NORESERVE.
    :param tokens: whether each carries a token, as its content.
    :raises InvalidArgument: naming the argument, its value and what is allowed;
        OutOfMemory: if they cannot be reserved.
    """

    def __init__(
        self,
        m: Machine,
        name: str,
        pages: int,
        *,
        size: int | None = None,
        policy: MemPolicy = DEFAULT_POLICY,
        cpu: int | None = None,
        reserve: bool = True,
        tokens: bool = False,
    ) -> None:
        check_text("name", name)
        if not name or name in m.users:
            raise kernel_error(-22, f"name: {name!r}; allowed: a name that no other user has")
        self.hstate = m.default_hstate if size is None else find_hstate(m, size)
        check_number("pages", pages, 0, NR_PAGES_MAX >> self.hstate.order)
        self.m, self.name, self.kind = m, name, USER_HUGETLB
        self.cpu = m.this_cpu if cpu is None else check_number("cpu", cpu, 0, m.nr_cpus - 1)
        self.policy, self.thp, self.cpuset = policy, "never", None
        self.interleave_offset, self.il_prev = 0, -1
        self.gfp = self.hstate.alloc_mask
        self._prepare_reclaim()
        if reserve:
            hugetlb_acct_memory(m, self.hstate, pages)
        #: By index: whether a reservation waits for the page to be touched.
        self.reserved = np.full(pages, reserve)
        self.engine = PageUser(m.memmap_engine, USER_HUGETLB, pages, self.hstate.order, tokens)
        m.users[name] = self
        m.users_by_number[self.engine.number] = self

    def fault(self, start: int, n: int, flags: int = 0) -> int:
        """Touch a range of huge pages, first to last.

        :param flags: PG_* marks of new ones.
        :return: how many were absent.
        :raises KernelError: ENOSPC when there is none for the next (its toucher gets SIGBUS);
            those before it stay.
        """
        start, n = self._check_range(start, n)
        self._check_alive()
        self._check_marks(flags)
        came = 0
        for index in (np.flatnonzero(self.engine.slots[start : start + n] == 0) + start).tolist():
            offset = self.interleave_offset + index
            where = place(self.m, self.policy, self.cpu, offset, self.mems, gfp_zone(self.gfp))
            pfn = alloc_huge_page(
                self.m, self.hstate, where.nid, where.nodemask, bool(self.reserved[index])
            )
            self.reserved[index] = False
            self.engine.attach(self.m, index, pfn, flags | PG_ACTIVE)
            came += 1
        return came

    def wait_for_page(self, index: int, where: Placement | None = None) -> int:
        """Refuse: what it has comes out of its pool, which waits for nothing.

        :raises InvalidArgument: always.
        """
        raise kernel_error(-22, f"user {self.name!r}: of huge pages; allowed: fault")

    def release(self, start: int, n: int) -> int:
        """Let the huge pages of a range go, first to last; their reservations are used up.

        A pinned one stays.

        :return: how many went.
        """
        start, n = self._check_range(start, n)
        gone = 0
        for index in (np.flatnonzero(self.engine.slots[start : start + n]) + start).tolist():
            if flags_of(self.m, int(self.engine.pfns(index, 1)[0])) & PG_PINNED:
                continue
            free_huge_page(self.m, self.hstate, self.engine.detach(self.m, index))
            gone += 1
        self.m.give_back_records()
        return gone

    def close(self) -> None:
        """Let everything go, reservations too, and be no user any more.

        :raises Busy: if a page is pinned; all others are gone then.
        """
        self.release(0, self.pages)
        if self.nr_present:
            raise kernel_error(-16, f"{self.name!r}: {self.nr_present} huge pages are pinned")
        hugetlb_acct_memory(self.m, self.hstate, -int(np.count_nonzero(self.reserved)))
        self.reserved[:] = False
        super().close()
