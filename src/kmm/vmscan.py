"""Reclaim (mm/vmscan.c), which is not modelled yet: no page of the model is on an LRU list."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kmm.trace import traced

if TYPE_CHECKING:
    from kmm.machine import Machine


@traced
def try_to_free_pages(m: Machine, nid: int, order: int, gfp: int) -> int:
    """Reclaim pages for an allocation that found none; a stub, there is nothing to reclaim.

    :param nid: node whose zonelist is reclaimed from; order, gfp: of the allocation.
    :return: pages reclaimed, always 0.
    """
    return 0
