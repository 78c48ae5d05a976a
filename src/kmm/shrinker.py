"""Reclaimable slabs: caches that give objects back when memory is short (mm/vmscan.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kmm.errors import check_number
from kmm.params import SLOT_PRESENT
from kmm.trace import traced

if TYPE_CHECKING:
    from kmm.machine import Machine
    from kmm.memory import User

SHRINK_BATCH = 128
DEFAULT_SEEKS = 2
_WINDOW = 4096  # slots of a cache that are looked at in one go


class Shrinker:
    """Gives back a cache's blocks that nobody holds (struct shrinker); one block is one object.

    Another rule is a subclass with its own ``count_objects`` and ``scan_objects``.

    :param percent: how many of each hundred blocks can be given back; which ones, their index says.
    :param seeks: what an object costs to make again; with more of them fewer are asked for.
    :raises InvalidArgument: naming the argument, its value and what is allowed.
    """

    def __init__(self, percent: int = 100, seeks: int = DEFAULT_SEEKS) -> None:
        self.percent = check_number("percent", percent, 0, 100)
        self.seeks = check_number("seeks", seeks, 0, 1000)
        self.nr_deferred = 0
        self._at = 0
        self._counted: tuple[int, int] | None = None

    def _free(self, user: User, start: int, end: int) -> npt.NDArray[np.int64]:
        """Indices of a range whose blocks are there and can be given back."""
        index = np.arange(start, end, dtype=np.uint64)
        spread = (index * np.uint64(2654435761) & np.uint64(0xFFFFFFFF)) >> np.uint64(8)
        there = user.engine.slots[start:end] & np.uint64(SLOT_PRESENT) != 0
        return np.flatnonzero(there & (spread % np.uint64(100) < self.percent)) + start

    def count_objects(self, user: User) -> int:
        """Return how many blocks could be given back."""
        present = user.nr_present
        if self._counted is None or self._counted[0] != present:
            self._counted = present, len(self._free(user, 0, user.pages))
        return self._counted[1]

    def scan_objects(self, user: User, nr_to_scan: int) -> int:
        """Give blocks back, from where the last call stopped; returns how many."""
        left, passed = min(nr_to_scan, self.count_objects(user)), 0
        freed = 0
        while freed < left and passed <= user.pages + _WINDOW:
            start = self._at if self._at < user.pages else 0
            end = min(start + _WINDOW, user.pages)
            found = self._free(user, start, end)[: left - freed]
            for run in np.split(found, np.flatnonzero(np.diff(found) != 1) + 1):
                if len(run):
                    user.engine.let_go(user.m, int(run[0]), len(run), user.cpu)
            freed += len(found)
            self._at = int(found[-1]) + 1 if len(found) and freed == left else end
            passed += end - start
        if self._counted is not None:
            self._counted = user.nr_present, self._counted[1] - freed
        return freed


@traced
def shrink_slab(m: Machine, nid: int, priority: int) -> int:
    """Let all caches give back what a priority asks for; returns pages freed.

    :param nid: the node that memory is short on; caches count and free on all nodes.
    """
    return sum(do_shrink_slab(m, user, priority) for user in list(m.shrinkers.values()))


@traced
def do_shrink_slab(m: Machine, user: User, priority: int) -> int:
    """Let one cache give back what a priority asks for; returns pages freed."""
    shrinker = user.shrinker
    freeable = shrinker.count_objects(user) if shrinker is not None else 0
    if shrinker is None or freeable <= 0:
        return 0
    deferred, shrinker.nr_deferred = shrinker.nr_deferred, 0
    delta = (freeable >> priority) * 4 // shrinker.seeks if shrinker.seeks else freeable // 2
    total = min((deferred >> priority) + delta, 2 * freeable)
    before, scanned = user.nr_present, 0
    while total >= SHRINK_BATCH or total >= freeable:
        nr = min(SHRINK_BATCH, total)
        if nr == 0 or (shrinker.scan_objects(user, nr) == 0 and not shrinker.count_objects(user)):
            break
        m.count_vm_event("slabs_scanned", nr)
        total -= nr
        scanned += nr
    shrinker.nr_deferred = min(max(deferred + delta - scanned, 0), 2 * freeable)
    return (before - user.nr_present) << user.engine.order


@traced
def drop_slab(m: Machine) -> None:
    """Let all caches give back all they can (drop_caches 2)."""
    shift = 0
    while True:
        freed = sum(shrink_slab(m, nid, 0) for nid in sorted(m.n_online))
        if freed >> shift <= 1:
            return
        shift += 1
