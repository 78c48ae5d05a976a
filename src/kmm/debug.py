"""What the kernel prints of a page (mm/debug.c, ``%pGp`` of lib/vsprintf.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kmm import _page_ref
from kmm.params import (
    KPF_RESERVED,
    PAGEBLOCK_NR_PAGES,
    PG_ACTIVE,
    PG_DIRTY,
    PG_HWPOISON,
    PG_LRU,
    PG_MLOCKED,
    PG_OFFLINE,
    PG_REFERENCED,
    PG_USER,
    PG_WRITEBACK,
    USER_ANON,
    USER_FILE,
    USER_SHMEM,
    USER_SLAB_RECLAIMABLE,
    USER_SLAB_UNRECLAIMABLE,
)

if TYPE_CHECKING:
    from kmm.machine import Machine

#: Bits of page->flags by what the model knows of them, in ascending order.
_BITS = (
    ("referenced", 1),
    ("uptodate", 2),
    ("dirty", 3),
    ("lru", 4),
    ("active", 5),
    ("slab", 9),
    ("reserved", 12),
    ("writeback", 15),
    ("mappedtodisk", 17),
    ("swapbacked", 19),
    ("unevictable", 20),
    ("mlocked", 21),
    ("hwpoison", 23),
)
_OF_MARK = (
    (PG_REFERENCED, "referenced"),
    (PG_DIRTY, "dirty"),
    (PG_LRU, "lru"),
    (PG_ACTIVE, "active"),
    (PG_WRITEBACK, "writeback"),
    (PG_MLOCKED, "mlocked"),
    (PG_HWPOISON, "hwpoison"),
)
_LAST_CPUPID = 0x1FFFFF


def head_of(m: Machine, pfn: int) -> int:
    """The first page of the huge page that a page is part of, or the page itself."""
    head = pfn - pfn % PAGEBLOCK_NR_PAGES
    return head if m.memmap_engine.is_allocated(head, 9) else pfn


def _names(m: Machine, pfn: int) -> set[str]:
    """The set flags of a page by their names, as far as the model knows them."""
    head = head_of(m, pfn)
    marks = _page_ref.marks(m.memmap_engine, head)
    if int(m.kpageflags(pfn, 1)[0]) & KPF_RESERVED:
        return {"reserved"}
    if not marks & PG_USER:
        # What the kernel took for itself without a word is slab, as most of that is.
        return {"hwpoison"} if marks & PG_HWPOISON else {"slab"}
    user = m.user_of(pfn)
    kind = user.kind if user is not None else 0
    names = {name for mark, name in _OF_MARK if marks & mark}
    if kind in (USER_SLAB_RECLAIMABLE, USER_SLAB_UNRECLAIMABLE):
        names.add("slab")
    if kind in (USER_ANON, USER_SHMEM, USER_FILE):
        names.add("uptodate")
    if kind in (USER_ANON, USER_SHMEM):
        names.add("swapbacked")
    if kind == USER_ANON:
        names |= {"referenced", "mappedtodisk"}
    if "mlocked" in names:
        names.add("unevictable")
    return names


def page_flags(m: Machine, pfn: int, without: tuple[str, ...] = ()) -> str:
    """Return a page's flags as the kernel prints them: the word, and what is set by name.

    :param without: names that are left out.
    """
    zone = m.page_zone(pfn)
    node, idx = (zone.nid, zone.zone_idx) if zone is not None else (0, 0)
    names = _names(m, pfn) - set(without)
    shown = [name for name, _ in _BITS if name in names]
    bits = sum(1 << bit for name, bit in _BITS if name in names)
    word = node << 54 | idx << 51 | _LAST_CPUPID << 30 | bits
    parts = [*shown, f"node={node}", f"zone={idx}", f"lastcpupid={_LAST_CPUPID:#x}"]
    return f"{word:#x}({'|'.join(parts)})"


def dump_page(m: Machine, pfn: int, reason: str) -> None:
    """Log the page that stands in the way; of what it prints, the raw words are left out."""
    # The type of a PageOffline page lies where others count who maps them.
    offline = _page_ref.marks(m.memmap_engine, head_of(m, pfn)) & PG_OFFLINE
    m.printk(
        f"page:(____ptrval____) refcount:1 mapcount:{-256 if offline else 0} "
        f"mapping:0000000000000000 index:0x0 pfn:{pfn:#x}"
    )
    m.printk(f"flags: {page_flags(m, pfn)}")
    m.printk(f"page dumped because: {reason}")
