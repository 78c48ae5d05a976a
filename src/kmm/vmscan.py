"""Reclaim (mm/vmscan.c), which is not modelled yet: no page of the model is on an LRU list."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kmm.mmzone import Zone
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


@traced
def wakeup_kswapd(m: Machine, zone: Zone, order: int, highest_zoneidx: int) -> None:
    """Leave word for the kswapd of a zone's node; a stub, it reclaims nothing yet.

    The allocator's own wake-ups do the same inside the engine; ``m.memmap_engine.kswapd_state``
    tells what a node's kswapd has heard.

    :param order: of the allocation; highest_zoneidx: the highest zone that may serve it.
    """
    m.memmap_engine.wakeup_kswapd(zone.index, order, highest_zoneidx)
