"""Dumps of pages that stand in somebody's way, for the log (mm/debug.c)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kmm._memory import page_owner
from kmm.params import (
    KPF_ACTIVE,
    KPF_COMPOUND_HEAD,
    KPF_DIRTY,
    KPF_HWPOISON,
    KPF_LRU,
    KPF_MAPPEDTODISK,
    KPF_MLOCKED,
    KPF_OWNER_PRIVATE,
    KPF_PRIVATE,
    KPF_REFERENCED,
    KPF_RESERVED,
    KPF_SLAB,
    KPF_SWAPBACKED,
    KPF_UNEVICTABLE,
    KPF_UPTODATE,
    KPF_WRITEBACK,
    PAGEBLOCK_NR_PAGES,
    PG_PINNED,
    SLOT_HUGE,
    USER_ANON,
    USER_FILE,
    USER_HUGETLB,
    USER_OFFLINE,
    USER_PAGE_TABLE,
    USER_SHMEM,
    USER_SLAB_RECLAIMABLE,
    USER_SLAB_UNRECLAIMABLE,
)
from kmm.trace import traced

if TYPE_CHECKING:
    from kmm.machine import Machine

# A word of /proc/kpageflags, the bit in struct page's flags and its name, in the order of printing.
_NAMES = (
    (KPF_REFERENCED, 1, "referenced"),
    (KPF_UPTODATE, 2, "uptodate"),
    (KPF_DIRTY, 3, "dirty"),
    (KPF_LRU, 4, "lru"),
    (KPF_ACTIVE, 5, "active"),
    (KPF_SLAB, 9, "slab"),
    (KPF_OWNER_PRIVATE, 10, "owner_priv_1"),
    (KPF_RESERVED, 12, "reserved"),
    (KPF_PRIVATE, 13, "private"),
    (KPF_WRITEBACK, 15, "writeback"),
    (KPF_COMPOUND_HEAD, 16, "head"),
    (KPF_MAPPEDTODISK, 17, "mappedtodisk"),
    (KPF_SWAPBACKED, 19, "swapbacked"),
    (KPF_UNEVICTABLE, 20, "unevictable"),
    (KPF_MLOCKED, 21, "mlocked"),
    (KPF_HWPOISON, 23, "hwpoison"),
)
_COMPOUND_KINDS = (USER_SLAB_RECLAIMABLE, USER_SLAB_UNRECLAIMABLE, USER_HUGETLB)
_AOPS = {USER_SHMEM: "shmem_aops", USER_FILE: "ext4_da_aops"}
_HIDDEN = "(____ptrval____)"


@dataclass(frozen=True, slots=True)
class _Page:
    """What a dump says of a page: its compound page's first one and order, its user's view."""

    head: int
    order: int = 0
    kind: int = 0
    index: int = 0
    number: int = 0
    name: str = ""
    mapcount: int = 0
    references: int = 1
    pinned: bool = False


def _look_at(m: Machine, pfn: int) -> _Page:
    number, index = page_owner(m.memmap_engine, pfn)
    user = m.users_by_number.get(number)
    if user is None:
        return _Page(pfn)
    order, slots = user.engine.order, user.engine.slots
    if order == 0 and int(slots[index]) & SLOT_HUGE:
        order = 9
    compound = order if order == 9 and user.engine.order == 0 else 0
    if user.kind in _COMPOUND_KINDS:
        compound = order
    head = pfn & ~((1 << compound) - 1)
    cache = user.kind in _AOPS
    mapped = int(user.kind == USER_ANON or (cache and user.engine.mapped))
    # The type of these lies where others count who maps them.
    mapcount = {USER_OFFLINE: -256, USER_PAGE_TABLE: -512}.get(user.kind, mapped)
    records = m.pageblocks["flags"][head // PAGEBLOCK_NR_PAGES] if compound >= 9 else None
    flags = int(m.memmap["flags"][head] if records is None else records)
    references = cache + mapped if cache or mapped else 1
    pinned = flags & PG_PINNED != 0
    references += pinned
    # The kernel's own pages have no index.
    shown = index if cache or user.kind == USER_ANON else 0
    return _Page(head, compound, user.kind, shown, number, user.name, mapcount, references, pinned)


def head_of(m: Machine, pfn: int) -> int:
    """The first page of the compound page that a page is part of, or the page itself."""
    return _look_at(m, pfn).head


def page_flags(m: Machine, pfn: int, without: tuple[str, ...] = ()) -> str:
    """Return a page's flags as the kernel prints them: the word, and what is set by name.

    :param without: names that are left out.
    """
    zone = m.page_zone(pfn)
    node, idx = (zone.nid, zone.zone_idx) if zone is not None else (0, 0)
    page = _look_at(m, pfn)
    word = int(m.kpageflags(page.head, 1)[0])
    if page.kind == USER_ANON and page.pinned:
        # Who pinned it has touched it, and trying to unmap it tells what its table entry knew.
        word |= KPF_REFERENCED | KPF_DIRTY
    marks = [(bit, name) for kpf, bit, name in _NAMES if word & kpf and name not in without]
    if not word and not page.kind:
        marks = [(9, "slab")]  # what else the kernel has for itself
    flags = node << 54 | idx << 51 | 0x1FFFFF << 30 | sum(1 << bit for bit, _ in marks)
    names = "|".join([name for _, name in marks] + [f"node={node}", f"zone={idx}"])
    return f"{flags:#x}({names}|lastcpupid=0x1fffff)"


@traced
def dump_page(m: Machine, pfn: int, reason: str) -> None:
    """Log what a page is, and why it is logged.

    Pointers, cgroups and the raw words that follow them in a real log are left out.

    :param reason: in the words of who asks; a page that was isolated for ``migration failure`` is
        shown as it was then.
    """
    page = _look_at(m, pfn)
    isolated = reason == "migration failure"
    cache = page.kind in _AOPS
    m.printk(
        f"page:{_HIDDEN} refcount:{page.references + isolated} mapcount:{page.mapcount} "
        f"mapping:{_HIDDEN if cache else '0000000000000000'} index:{page.index:#x} pfn:{pfn:#x}"
    )
    if page.order:
        m.printk(
            f"head:{_HIDDEN} order:{page.order} compound_mapcount:{page.mapcount} "
            "compound_pincount:0"
        )
    if cache:
        aops = _AOPS[page.kind]
        m.printk(f'aops:{aops} ino:{page.number:x} dentry name:"{page.name}"')
    kind = "anon " if page.kind == USER_ANON else ""
    m.printk(f"{kind}flags: {page_flags(m, pfn, ('lru',) if isolated else ())}")
    m.printk(f"page dumped because: {reason}")
