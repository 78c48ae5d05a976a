"""Dumps compared but for what a failed offline leaves in the allocator (symbols.LEFT_BEHIND)."""

from __future__ import annotations

from typing import Any

import numpy as np

from kmm._memmap import page_dtype, pageblock_dtype
from kmm.snapshot import differences

BUDDY, PCP, KIND_SHIFT, HWPOISON = 1, 2, 7, 1 << 13


def _merged(blocks: list[tuple[int, int]]) -> list[list[int]]:
    """Ranges of pages (first, behind the last) that (pfn, order) blocks make up."""
    out: list[list[int]] = []
    for pfn, order in sorted(blocks):
        if out and out[-1][1] == pfn:
            out[-1][1] += 1 << order
        else:
            out.append([pfn, pfn + (1 << order)])
    return out


def _zone(zone: dict[str, Any]) -> dict[str, Any]:
    blocks = [(pfn, order) for (order, _), pfns in zone["free"].items() for pfn in pfns]
    for _, lists in zone["pcp"]:
        for pindex, pfns in enumerate(lists):
            blocks += [(pfn, 9 if pindex >= 12 else pindex // 3) for pfn in pfns]
    sizes = [state[1:3] for state, _ in zone["pcp"]]
    out = {**zone, "free": _merged(blocks), "pcp": sizes}
    del out["nr_free_pages"]
    return out


def _pages(block: tuple[bytes, bytes]) -> bytes:
    flags = np.frombuffer(block[0], dtype=page_dtype["flags"]).copy()
    flags[np.isin(flags >> KIND_SHIFT & 3, (BUDDY, PCP))] &= HWPOISON
    return flags.tobytes() + block[1]


def _records(records: dict[str, Any]) -> dict[str, Any]:
    rows = np.frombuffer(records["pageblocks"], dtype=pageblock_dtype).copy()
    kept = np.zeros_like(rows)
    used = ~np.isin(rows["kind"], (0, BUDDY, PCP))
    kept[used] = rows[used]
    kept["zone"], kept["state"] = rows["zone"], rows["state"]
    pages = {number: _pages(block) for number, block in records["pages"].items()}
    pages = {number: block for number, block in pages.items() if any(block)}
    return {"sections": records["sections"], "pageblocks": kept.tobytes(), "pages": pages}


def settled(state: dict[str, Any]) -> dict[str, Any]:
    """A dump that tells which pages are free and which are used, but not how lists hold them.

    Left out are the order and length of free lists, what is parked on per-CPU lists, the types of
    pageblocks, and the order of LRU lists, to whose fronts pages come back that were to move;
    everything else, record by record, is in it.
    """
    zones = {index: _zone(zone) for index, zone in state["zones"].items()}
    lru = {name: np.sort(np.frombuffer(pfns, np.int64)) for name, pfns in state["lru"].items()}
    sets = {name: pfns.tobytes() for name, pfns in lru.items()}
    return {**state, "zones": zones, "records": _records(state["records"]), "lru": sets}


def settled_differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Where two dumps differ beyond that."""
    return differences(settled(before), settled(after))
