"""What became of each page of a range that went offline, or was to (mm/memory_hotplug.c).

Whoever wants to know sets ``m.offline_report``, or asks m.offline_pages_report; without that
nothing is looked at or kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kmm._page_owner import pages_in_use
from kmm.arguments import check_block_id
from kmm.errors import KernelError
from kmm.params import (
    PAGE_SHIFT,
    PAGES_PER_SECTION,
    PG_DIRTY,
    PG_HWPOISON,
    PG_MOVABLE_OPS,
    PG_OFFLINE,
    SLOT_PFN,
    SLOT_PRESENT,
    SLOT_SWAPPED,
    USER_FILE,
    USER_HUGETLB,
)
from kmm.sparse import SECTION_IS_ONLINE

if TYPE_CHECKING:
    from kmm.machine import Machine

#: What can become of a page that was in use.
FATES = (
    "stays",  # it is where it was
    "migrated",
    "swapped out",
    "written back",  # of a file, it was dirty
    "dropped",  # of a file, it was clean
    "freed",  # its user let it go meanwhile
    "dissolved",  # of a free huge page
    "poisoned",  # goes along, broken
    "offered",  # goes along, a driver let it go
)
_STAYS, _MIGRATED, _SWAPPED, _WRITTEN, _DROPPED, _FREED, _DISSOLVED, _POISONED, _OFFERED = range(9)


@dataclass(frozen=True, slots=True)
class PageFate:
    """What became of one page: its user (None if unknown) and index there, and where it is now."""

    pfn: int
    user: str | None
    index: int
    fate: str
    to: int | None


@dataclass(slots=True)
class OfflineAttempt:
    """One attempt to take a range of pages offline.

    ``free`` pages were free before; ``pfns``, ``fates`` (places in FATES) and ``to`` (a pfn, -1
    for none) are of those that were in use, page by page.  ``error`` is the refusal, None if there
    was none; ``reason`` the kernel's word for it, ``blocked`` the page in the way, if it is one.
    """

    start_pfn: int
    nr_pages: int
    free: int = 0
    pfns: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    fates: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, dtype=np.uint8))
    to: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    users: list[str | None] = field(default_factory=list)
    indices: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    error: KernelError | None = None
    reason: str = ""
    blocked: int | None = None
    log: list[str] = field(default_factory=list)

    @property
    def errno(self) -> int:
        """The errno of the refusal, 0 if there was none."""
        return (self.error.errno or 0) if self.error is not None else 0

    def counts(self) -> dict[str, int]:
        """Return how many pages had each fate, and how many were free."""
        found = Counter(FATES[code] for code in self.fates.tolist())
        return {"free": self.free, **{name: found[name] for name in FATES if found[name]}}

    def pages(self) -> Iterator[PageFate]:
        """Tell page by page, upward, what became of those that were in use."""
        for i, pfn in enumerate(self.pfns.tolist()):
            to = int(self.to[i])
            yield PageFate(
                pfn,
                self.users[i],
                int(self.indices[i]),
                FATES[int(self.fates[i])],
                to if to >= 0 else None,
            )

    def debug_line(self) -> str:
        """Return what pr_debug would say of the failure; nothing if there was none."""
        if not self.reason:
            return ""
        first = self.start_pfn << PAGE_SHIFT
        last = ((self.start_pfn + self.nr_pages) << PAGE_SHIFT) - 1
        return f"memory offlining [mem {first:#010x}-{last:#010x}] failed due to {self.reason}"

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        return {
            "start_pfn": self.start_pfn,
            "nr_pages": self.nr_pages,
            "counts": self.counts(),
            "errno": self.errno,
            "reason": self.reason,
            "blocked": self.blocked,
            "log": self.log,
            "pages": [asdict(page) for page in self.pages()],
        }


class OfflineReport:
    """Keeps every attempt of a machine while it is set as its ``offline_report``."""

    def __init__(self, m: Machine) -> None:
        self.m = m
        self.attempts: list[OfflineAttempt] = []

    @contextmanager
    def attempt(self, start_pfn: int, nr_pages: int) -> Iterator[OfflineAttempt]:
        """Watch one attempt."""
        m, log = self.m, len(self.m.log)
        before = _Before(m, start_pfn, nr_pages)
        out = OfflineAttempt(start_pfn, nr_pages, before.free)
        self.attempts.append(out)
        try:
            yield out
        except KernelError as e:
            out.error, out.reason, out.blocked = e, e.reason, e.pfn
            raise
        finally:
            out.log = m.log[log:]
            before.tell(out)


class _Before:
    """What was in use in a range, page by page, before an attempt."""

    def __init__(self, m: Machine, start_pfn: int, nr_pages: int) -> None:
        self.m = m
        # Of pages that are not online the records say nothing.
        flags = m.sections["flags"][
            start_pfn // PAGES_PER_SECTION : -(-(start_pfn + nr_pages) // PAGES_PER_SECTION)
        ]
        whole = bool((flags & SECTION_IS_ONLINE != 0).all())
        end = start_pfn + nr_pages if whole else start_pfn
        rows = pages_in_use(m.memmap_engine, start_pfn, end)
        counts = rows["nr_pages"].astype(np.int64)
        each = np.repeat(np.arange(len(rows)), counts)
        self.rows = rows[each]
        firsts = np.cumsum(counts) - counts
        self.offset = np.arange(len(each), dtype=np.int64) - firsts[each]
        self.pfns = self.rows["pfn"].astype(np.int64) + self.offset
        self.free = nr_pages - len(each)

    def tell(self, out: OfflineAttempt) -> None:
        """Fill in what has become of the pages."""
        numbers = self.rows["user"].astype(np.int64)
        out.pfns = self.pfns
        out.fates = np.zeros(len(self.pfns), dtype=np.uint8)
        out.to = np.full(len(self.pfns), -1, dtype=np.int64)
        out.indices = self.rows["index"].astype(np.int64)
        names: list[str | None] = [None] * len(self.pfns)
        for number in np.unique(numbers).tolist():
            user = self.m.users_by_number.get(number)
            which = np.flatnonzero(numbers == number)
            if user is None:
                out.fates[which] = _FREED if number else _STAYS
                continue
            for i in which.tolist():
                names[i] = user.name
            self._of_user(out, which, number)
        out.users = names
        gone = out.error is None
        flags = self.rows["flags"]
        if gone:
            out.fates[flags & PG_HWPOISON != 0] = _POISONED
            out.fates[(flags & PG_OFFLINE != 0) & (flags & PG_MOVABLE_OPS == 0)] = _OFFERED
            away = np.isin(out.fates, (_POISONED, _OFFERED))
            out.to[away] = -1

    def _of_user(self, out: OfflineAttempt, which: npt.NDArray[np.int64], number: int) -> None:
        """Fill in the fates of one user's pages."""
        user = self.m.users_by_number[number]
        single = user.engine.order == 0
        at = out.indices[which] + (self.offset[which] if single else 0)
        out.indices[which] = at
        there = at < user.pages
        slots = np.where(there, user.engine.slots[np.where(there, at, 0)], np.uint64(0))
        present = slots & np.uint64(SLOT_PRESENT) != 0
        now = (slots & np.uint64(SLOT_PFN)).astype(np.int64) + (0 if single else self.offset[which])
        fates = np.full(len(which), self._fate_of_absent(number), dtype=np.uint8)
        if user.kind == USER_FILE:
            dirty = self.rows["flags"][which] & PG_DIRTY != 0
            fates[dirty] = _WRITTEN
        fates[slots & np.uint64(SLOT_SWAPPED) != 0] = _SWAPPED
        fates[present] = np.where(now[present] == self.pfns[which][present], _STAYS, _MIGRATED)
        out.fates[which] = fates
        out.to[which] = np.where(present, now, -1)

    def _fate_of_absent(self, number: int) -> int:
        kind = self.m.users_by_number[number].kind
        return {USER_FILE: _DROPPED, USER_HUGETLB: _DISSOLVED}.get(kind, _FREED)


def offline_pages_report(m: Machine, block_id: int) -> OfflineAttempt:
    """Take a block offline and return what became of its pages (see Machine)."""
    from kmm.memory_block import state_store

    block = check_block_id(m, block_id)
    was, report = m.offline_report, OfflineReport(m)
    m.offline_report = report
    try:
        state_store(m, block, "offline")
    except KernelError as e:
        if not report.attempts:
            start = block.block_id * m.block_pages
            report.attempts.append(OfflineAttempt(start, m.block_pages, error=e, reason=e.reason))
    finally:
        m.offline_report = was
    return report.attempts[0]
