"""Which pages keep a range from being isolated or going offline, page by page, slowly.

Reads the kernel's own words for a page (reference count, compound, LRU, flags) off the records.
"""

from __future__ import annotations

from dataclasses import dataclass

from kmm import Machine
from kmm import params as p

COMPOUND = {
    p.USER_ANON,
    p.USER_SHMEM,
    p.USER_FILE,
    p.USER_SLAB_RECLAIMABLE,
    p.USER_SLAB_UNRECLAIMABLE,
    p.USER_HUGETLB,
}


@dataclass
class Page:
    """A struct page as the kernel would have it."""

    buddy: bool = False
    refcount: int = 0
    flags: int = 0
    head: int = -1  # of the compound page that it is part of
    hugetlb: bool = False


def pages(m: Machine, start: int, end: int) -> list[Page]:
    """Build the struct pages of a range that begins at a multiple of 1024."""
    out = [Page() for _ in range(end - start)]
    for i, page in enumerate(out):
        pfn = start + i
        block = m.pageblocks[pfn >> 9]
        fill = int(block["state"]) & 0x7F
        own = int(m.memmap["flags"][pfn])
        state = int(m.page_states[pfn])
        if pfn % 512 == 0 and int(block["kind"]) == 3:
            _used(m, out, pfn, i, int(block["order"]), int(block["flags"]) | own & p.PG_HWPOISON)
        elif pfn % 512 == 0 and int(block["kind"]) == 1:
            _free(out, i, int(block["order"]))
        elif pfn % 512 == 0 and int(block["kind"]) == 2:
            continue
        elif state & p.STATE_BUDDY:
            _free(out, i, state & p.STATE_ORDER)
        elif state & p.STATE_PCP:
            continue
        elif state & p.STATE_ALLOCATED:
            _used(m, out, pfn, i, state & p.STATE_ORDER, own)
        elif own:
            page.flags |= own
            page.refcount = 0 if own & p.PG_OFFLINE else 1
        elif fill in (p.FILL_RESERVED, p.FILL_VMEMMAP) and not page.buddy and page.refcount == 0:
            page.flags, page.refcount = p.PG_RESERVED, 1
    return out


def _free(out: list[Page], i: int, order: int) -> None:
    for page in out[i : i + (1 << order)]:
        page.buddy = True


def _used(m: Machine, out: list[Page], pfn: int, i: int, order: int, flags: int) -> None:
    user = m.user_of(pfn) if flags & p.PG_USER else None
    kind = user.kind if user is not None else 0
    first = out[i]
    first.refcount, first.flags = 1, flags
    if order and kind in COMPOUND:
        for page in out[i : i + (1 << order)]:
            page.head, page.flags = i, flags
            page.hugetlb = kind == p.USER_HUGETLB


def has_unmovable_pages(
    found: list[Page], start: int, end: int, movable: bool, offline: bool
) -> int:
    """The first page of a range (places in the list) that can neither move nor go, or -1."""
    i = start
    while i < end:
        page = found[i]
        lru = page.flags & (p.PG_LRU | p.PG_MOVABLE_OPS)
        if page.flags & (p.PG_PINNED | p.PG_USER) == p.PG_PINNED:
            lru = 1
        if page.flags & p.PG_RESERVED:
            return i
        if movable or page.buddy:
            i += 1
            continue
        if page.head >= 0:
            if not page.hugetlb and not lru:
                return i
            while i < end and found[i].head == page.head:
                i += 1
            continue
        gone = page.refcount == 0
        goes = offline and page.flags & (p.PG_HWPOISON | p.PG_OFFLINE)
        if not (gone or goes or lru):
            return i
        i += 1
    return -1


def test_pages_isolated(found: list[Page], offline: bool) -> int:
    """The first page (its place) that is neither free nor goes along, or -1."""
    for i, page in enumerate(found):
        if page.buddy:
            continue
        if offline and page.head <= i and page.flags & p.PG_HWPOISON and page.head in (-1, i):
            continue
        if offline and page.flags & p.PG_OFFLINE and page.refcount == 0:
            continue
        return i
    return -1
