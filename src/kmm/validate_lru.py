"""Recounts of what users' pages are on: LRU lists, dirty pages, the swap device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kmm.errors import ValidationError
from kmm.params import (
    MAX_NR_ZONES,
    PAGEBLOCK_NR_PAGES,
    PG_ACTIVE,
    PG_DIRTY,
    PG_LRU,
    PG_MLOCKED,
    SLOT_HUGE,
    SLOT_PFN,
    SLOT_PRESENT,
    USER_ANON,
    USER_FILE,
    USER_SHMEM,
)
from kmm.vmstat import ZONE_STAT_ITEMS

if TYPE_CHECKING:
    from kmm.machine import Machine
    from kmm.memory import User

_LISTS = 5  # the four with an order, and the unevictable pages
_UNEVICTABLE = 4


def _pages(m: Machine, user: User) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The pfns of a user's pages, and the marks of the block that each is part of."""
    slots = user.engine.slots
    slots = slots[slots & np.uint64(SLOT_PRESENT) != 0]
    pfns = (slots & np.uint64(SLOT_PFN)).astype(np.int64)
    huge = slots & np.uint64(SLOT_HUGE) != 0
    flags = np.where(
        huge, m.pageblocks["flags"][pfns // PAGEBLOCK_NR_PAGES], m.memmap["flags"][pfns]
    )
    return pfns, flags.astype(np.int64)


def check_lru(m: Machine) -> None:
    """Sizes of LRU lists by zone and by node, and how many pages of each file are dirty.

    :raises ValidationError: at the first disagreement.
    """
    found = np.zeros((len(m.all_zones()), _LISTS), dtype=np.int64)
    for user in m.users.values():
        if user.kind not in (USER_ANON, USER_SHMEM, USER_FILE):
            continue
        pfns, flags = _pages(m, user)
        dirty = int(np.count_nonzero(flags & PG_DIRTY)) if user.kind == USER_FILE else 0
        if dirty != user.engine.nr_dirty:
            raise ValidationError(
                f"{user.name}: {user.engine.nr_dirty} dirty pages, but recounted {dirty}"
            )
        listed = flags & PG_LRU != 0
        base = 2 if user.kind == USER_FILE else 0
        lru = np.where(flags & PG_MLOCKED, _UNEVICTABLE, base + (flags & PG_ACTIVE != 0))
        zone = m.pageblocks["zone"][pfns // PAGEBLOCK_NR_PAGES].astype(np.int64) - 1
        np.add.at(found, (zone[listed], lru[listed]), 1)
    for z in m.all_zones():
        _equal(f"node {z.nid} zone {z.name}", z.stat()[:_LISTS], found[z.index].tolist())
    for nid in m.nodes:
        mine = found[nid * MAX_NR_ZONES : (nid + 1) * MAX_NR_ZONES].sum(axis=0)
        _equal(f"node {nid}", m.memmap_engine.node_stat(nid)[:_LISTS], mine.tolist())


def _equal(where: str, have: list[int], want: list[int]) -> None:
    for name, a, b in zip(ZONE_STAT_ITEMS[:_LISTS], have, want, strict=True):
        if a != b:
            raise ValidationError(f"{where}: {name} {a}, but recounted {b}")
