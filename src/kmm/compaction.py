"""Compaction (mm/compaction.c), which is not modelled yet: no page of the model can move."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kmm.trace import traced

if TYPE_CHECKING:
    from kmm.machine import Machine


@traced
def try_to_compact_pages(m: Machine, nid: int, order: int, gfp: int) -> int:
    """Move pages together for an allocation that found no block; a stub, no page can move.

    :param nid: node whose zonelist is compacted; order, gfp: of the allocation.
    :return: blocks of the order that were made, always 0.
    """
    return 0
