"""Balloons: drivers that take pages away from the system (mm/balloon_compaction.c).

What a driver has taken is PageOffline.  Drivers differ in what becomes of it when its memory
block goes offline: virtio-balloon moves its pages (with CONFIG_BALLOON_COMPACTION), others hold
theirs, which is in the way, and virtio-mem lets its pages go along (``virtio_mem``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kmm import _page_owner, _page_ref
from kmm.errors import check_number, kernel_error
from kmm.memory import User
from kmm.params import PG_OFFLINE, PG_PINNED
from kmm.trace import traced

if TYPE_CHECKING:
    from kmm.machine import Machine
    from kmm.mmzone import Zone


@traced
def adjust_managed_page_count(m: Machine, zone: Zone, count: int) -> None:
    """Count pages as managed, or with a minus as taken; marks and reserves follow only later."""
    zone.managed_pages += count
    m.totalram_pages += count
    m.recomputed -= {"watermarks", "reserves", "thresholds"}


def count_by_zone(m: Machine, pfns: npt.NDArray[np.int64]) -> list[tuple[Zone, int]]:
    """Return how many of some pages lie in each zone."""
    counts = np.bincount(m.pageblocks["zone"][pfns >> 9])
    table = m.all_zones()
    return [(table[z - 1], int(counts[z])) for z in np.flatnonzero(counts).tolist() if z]


class DriverPages(User):
    """The pages of a driver, which come and go through it alone, as it counts what is managed."""

    def take(self, start: int, n: int, flags: int) -> int:
        """Get pages for the driver (see User.fault)."""
        return super().fault(start, n, flags)

    def give_back(self, start: int, n: int) -> int:
        """Let pages of the driver go (see User.release)."""
        return super().release(start, n)

    def fault(self, start: int, n: int, flags: int = 0) -> int:
        """Get pages, where no driver has this any more.

        :raises InvalidArgument: if one has; as User.fault.
        """
        self._refuse("fault")
        return super().fault(start, n, flags)

    def release(self, start: int, n: int) -> int:
        """Let pages go, where no driver has this any more.

        :raises InvalidArgument: if one has; as User.release.
        """
        self._refuse("release")
        return super().release(start, n)

    def _refuse(self, name: str) -> None:
        if balloon_of(self.m, self) is not None:
            raise kernel_error(-22, f"{name}: {self.name!r}; allowed: users that no driver has")


class Balloon:
    """A driver that takes single pages, last in, first out.

    :param name: of the user that has them; pages: how many it can take.
    :param movable: whether it can move them (virtio-balloon), or holds them in place.
    :param unmanaged: whether what it takes is not counted as the system's memory: of
        virtio-balloon unless it deflates when memory runs out.
    :raises InvalidArgument: as User.
    """

    #: Whether its references go when a block of its goes offline.
    lets_go = False

    def __init__(
        self, m: Machine, name: str, pages: int, *, movable: bool = True, unmanaged: bool = True
    ) -> None:
        self.m, self.movable, self.unmanaged = m, movable, unmanaged
        self.refuses = False
        self.user = DriverPages(m, name, "driver_movable" if movable else "offline", pages)
        m.balloons.append(self)

    @property
    def nr_pages(self) -> int:
        """How many pages it has."""
        return self.user.nr_present

    def inflate(self, n: int) -> int:
        """Take n more pages (balloon_page_enqueue).

        :return: how many it got.
        :raises OutOfMemory: when there is none for the next; those before it stay.
        """
        check_number("n", n, 0, self.user.pages - self.nr_pages)
        before = self.nr_pages
        try:
            self.user.take(before, n, PG_OFFLINE | (PG_PINNED if self.refuses else 0))
        finally:
            got = self.nr_pages - before
            self.m.count_vm_event("balloon_inflate", got)
            self._adjust(before, got, -1)
        return got

    def deflate(self, n: int) -> int:
        """Give the last n pages back (balloon_page_dequeue); returns how many."""
        check_number("n", n, 0, self.nr_pages)
        start = self.nr_pages - n
        if self.refuses:
            self._mark(start, n, False)
        self._adjust(start, n, 1)
        self.m.count_vm_event("balloon_deflate", n)
        return self.user.give_back(start, n)

    def refuse(self, refuses: bool = True) -> None:
        """Let the driver refuse to move its pages (what its migrate_page says), or agree again.

        :raises InvalidArgument: for one that holds its pages in place anyway.
        """
        if not self.movable:
            raise kernel_error(-22, f"{self.user.name!r}: movable: False; allowed: True")
        self.refuses = refuses
        self._mark(0, self.nr_pages, refuses)

    def _mark(self, start: int, n: int, refuses: bool) -> None:
        # To those that move pages it is as if somebody held them.
        change = _page_ref.set_marks if refuses else _page_ref.clear_marks
        for pfn in self.user.pfns(start, n).tolist():
            change(self.m.memmap_engine, pfn, PG_PINNED)

    def close(self) -> None:
        """Give everything back, and be no driver any more."""
        self.deflate(self.nr_pages)
        self.m.balloons.remove(self)
        self.user.close()

    def _adjust(self, start: int, n: int, sign: int) -> None:
        if self.unmanaged and n:
            for zone, count in count_by_zone(self.m, self.user.pfns(start, n)):
                adjust_managed_page_count(self.m, zone, sign * count)

    def unmanaged_by_zone(self) -> dict[int, int]:
        """How many pages it has that do not count as managed, by their zones' indices."""
        if not self.unmanaged:
            return {}
        pfns = self.user.pfns()
        return {zone.index: n for zone, n in count_by_zone(self.m, pfns[pfns >= 0])}

    def migrated(self, start: npt.NDArray[np.uint64], to: npt.NDArray[np.uint64]) -> None:
        """Count pages of its own that were moved, and what zones manage then."""
        self.m.count_vm_event("balloon_migrate", len(to))
        if not self.unmanaged:
            return
        for pfns, sign in ((start, 1), (to, -1)):
            for zone, count in count_by_zone(self.m, pfns.astype(np.int64)):
                adjust_managed_page_count(self.m, zone, sign * count)


def note_migrated(m: Machine, start: npt.NDArray[np.uint64], to: npt.NDArray[np.uint64]) -> None:
    """Tell balloons which of their pages were moved."""
    for balloon in m.balloons:
        mine = _page_owner.used_by(m.memmap_engine, to, balloon.user.engine.number)
        if mine.any():
            balloon.migrated(start[mine], to[mine])


def balloon_of(m: Machine, user: User | None) -> Balloon | None:
    """The driver whose pages a user's are, if it is one's."""
    return next((b for b in m.balloons if b.user is user), None)


def check_whole(m: Machine, pfn: int, nr_pages: int, unit: int) -> None:
    """Check that a range consists of whole units of a driver, at least one.

    :raises InvalidArgument: naming the argument and what is allowed.
    """
    for name, value in (("pfn", pfn), ("nr_pages", nr_pages)):
        if value % unit or (name == "nr_pages" and value == 0):
            raise kernel_error(-22, f"{name}: {value}; allowed: multiples of {unit} above 0")
