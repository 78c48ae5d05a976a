"""Checks of what callers hand to kernel functions, before anything is changed.

The kernel trusts its callers.  What no caller in C could hand over (a text for an address, a node
that has no pgdat) is refused here as InvalidArgument; what would make the kernel corrupt its own
accounts is an ImpossibleState with the function's name.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kmm.errors import bug, check_number, kernel_error, shown
from kmm.mmzone import MemoryGroup, Zone
from kmm.params import (
    NR_PAGES_MAX,
    PAGE_SHIFT,
    PAGEBLOCK_NR_PAGES,
    PAGES_PER_SECTION,
    PFN_SECTION_SHIFT,
)
from kmm.sparse import (
    SECTION_HAS_MEM_MAP,
    SECTION_IS_ONLINE,
    SECTION_MARKED_PRESENT,
    subsection_mask,
)

if TYPE_CHECKING:
    from kmm.machine import Machine
    from kmm.memory_block import MemoryBlock

_U64 = (1 << 64) - 1
_EXISTS = SECTION_MARKED_PRESENT | SECTION_HAS_MEM_MAP


def check_integer(name: str, value: object) -> int:
    """Return a whole number whose limits the kernel itself checks.

    :raises InvalidArgument: naming the argument, its value and what is allowed.
    """
    if not isinstance(value, bool):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise kernel_error(-22, f"{name}: {shown(value)}; allowed: a whole number")


def check_bytes(start: object, size: object) -> tuple[int, int]:
    """Return the first byte and the size of a range as plain numbers below 2^64.

    :raises InvalidArgument: naming the argument, its value and what is allowed.
    """
    return check_number("start", start, 0, _U64), check_number("size", size, 0, _U64)


def check_pfns(start_pfn: object, nr_pages: object) -> tuple[int, int]:
    """Return the first pfn and the pages of a range as plain numbers below 2^64.

    :raises InvalidArgument: naming the argument, its value and what is allowed.
    """
    return check_number("pfn", start_pfn, 0, _U64), check_number("nr_pages", nr_pages, 0, _U64)


def check_block_id(m: Machine, block_id: object) -> MemoryBlock:
    """Return the memory block that has a number.

    :raises InvalidArgument: naming the value and what is allowed.
    """
    number = check_integer("block_id", block_id)
    block = m.memory_blocks.get(number)
    if block is None:
        ids = sorted(m.memory_blocks)
        known = f"those that exist, of {ids[0]} to {ids[-1]}" if ids else "none, there is no block"
        raise kernel_error(-22, f"block_id: {number}; allowed: {known}")
    return block


def check_tokens(name: str, values: object) -> npt.NDArray[np.uint64]:
    """Return whole numbers of 64 bits as an array.

    :raises InvalidArgument: naming the argument, the first wrong value and what is allowed.
    """
    if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "iu":
        if values.dtype.kind == "i" and len(values):
            check_number(name, int(values.min()), 0, _U64)
        return np.ascontiguousarray(values, dtype=np.uint64)
    if (
        isinstance(values, str | bytes)
        or not isinstance(values, Iterable)
        or getattr(values, "ndim", 1) != 1
    ):
        raise kernel_error(-22, f"{name}: {shown(values)}; allowed: a list of whole numbers")
    return np.array([check_number(name, value, 0, _U64) for value in values], dtype=np.uint64)


def check_nid(m: Machine, nid: object) -> int:
    """Return the number of a possible node.

    :raises InvalidArgument: naming the value and what is allowed.
    """
    number = check_integer("nid", nid)
    if number not in m.nodes:
        raise kernel_error(-22, f"nid: {number}; allowed: {', '.join(map(str, m.nodes))}")
    return number


def check_kind(name: str, value: Any, kind: type) -> None:
    """Check that an argument is an object of a class.

    :raises InvalidArgument: naming the argument, its value and what is allowed.
    """
    if not isinstance(value, kind):
        raise kernel_error(-22, f"{name}: {shown(value)}; allowed: a {kind.__name__}")


def check_zone(m: Machine, zone: Zone) -> None:
    """Check that a zone is one of the machine's.

    :raises InvalidArgument: naming the value and what is allowed.
    """
    check_kind("zone", zone, Zone)
    pgdat = m.nodes.get(zone.nid)
    if pgdat is None or pgdat.zone(zone.zone_idx) is not zone:
        raise kernel_error(-22, "zone: of another machine; allowed: a zone of this one")


def check_group(m: Machine, group: MemoryGroup | None) -> None:
    """Check that a memory group is one of the machine's, or None.

    :raises InvalidArgument: naming the value and what is allowed.
    """
    if group is None:
        return
    check_kind("group", group, MemoryGroup)
    if m.memory_groups.get(group.mgid) is not group:
        raise kernel_error(-22, "group: not registered; allowed: None, or a registered group")


def check_addressable(where: str, start: int, size: int) -> None:
    """Stop at a range of bytes that has no section numbers, which the kernel would look up.

    :param where: the kernel function.
    :raises ImpossibleState: if the range ends beyond 64 TiB.
    """
    if (start + size) >> PAGE_SHIFT > NR_PAGES_MAX:
        bug(where, f"{start:#x}+{size:#x} ends beyond {NR_PAGES_MAX << PAGE_SHIFT:#x}")


def _flags(m: Machine, start_pfn: int, nr_pages: int) -> tuple[int, Any]:
    first = start_pfn >> PFN_SECTION_SHIFT
    return first, m.sections["flags"][first : -(-(start_pfn + nr_pages) // PAGES_PER_SECTION)]


def _all_are(m: Machine, start_pfn: int, nr_pages: int, mask: int, want: int) -> bool:
    """Whether all sections of a range are whole and have these flags; quicker than arrays."""
    if start_pfn + nr_pages > NR_PAGES_MAX:
        return False
    return m.memmap_engine.sections_are(start_pfn, nr_pages, mask, want)


def check_can_online(m: Machine, where: str, start_pfn: int, nr_pages: int) -> None:
    """Stop if part of a range of pages is online or has no memmap, which the kernel faults on.

    :param where: the kernel function; start_pfn: first pfn; nr_pages: pages up to a section's end.
    :raises ImpossibleState: naming the function and the section.
    """
    if _all_are(m, start_pfn, nr_pages, _EXISTS | SECTION_IS_ONLINE, _EXISTS):
        return
    check_addressable(where, start_pfn << PAGE_SHIFT, nr_pages << PAGE_SHIFT)
    first, flags = _flags(m, start_pfn, nr_pages)
    maps = ~m.sections["subsection_map"][first : first + len(flags)]
    begin = start_pfn % PAGES_PER_SECTION
    maps[:1] &= np.uint64(subsection_mask(begin, PAGES_PER_SECTION - begin))
    missing = np.flatnonzero((flags & _EXISTS != _EXISTS) | (maps != 0))
    if missing.size:
        bug(where, f"section {first + int(missing[0])} does not exist")
    online = np.flatnonzero(flags & SECTION_IS_ONLINE)
    if online.size:
        bug(where, f"section {first + int(online[0])} is online")


def check_pages_unused(m: Machine, where: str, start_pfn: int, nr_pages: int) -> None:
    """Stop if a page of a range is online in a zone, before its memmap goes.

    Pages that were added into a hole of an online boot section are in no zone.

    :param where: the kernel function; start_pfn: first pfn; nr_pages: pages, multiples of 512.
    :raises ImpossibleState: naming the function and the section.
    """
    if _all_are(m, start_pfn, nr_pages, SECTION_IS_ONLINE, 0):
        return
    check_addressable(where, start_pfn << PAGE_SHIFT, nr_pages << PAGE_SHIFT)
    first, flags = _flags(m, start_pfn, nr_pages)
    for section in (first + np.flatnonzero(flags & SECTION_IS_ONLINE)).tolist():
        at = max(start_pfn, section * PAGES_PER_SECTION)
        end = min(start_pfn + nr_pages, (section + 1) * PAGES_PER_SECTION)
        if m.pageblocks["zone"][at // PAGEBLOCK_NR_PAGES : end // PAGEBLOCK_NR_PAGES].any():
            bug(where, f"section {section} is online")


def check_is_online(m: Machine, where: str, start_pfn: int, nr_pages: int) -> None:
    """Stop if part of a range of pages is not online: its memmap says nothing.

    :param where: the kernel function; start_pfn: first pfn; nr_pages: pages.
    :raises ImpossibleState: naming the function and the first section that is offline.
    """
    if _all_are(m, start_pfn, nr_pages, SECTION_IS_ONLINE, SECTION_IS_ONLINE):
        return
    check_addressable(where, start_pfn << PAGE_SHIFT, nr_pages << PAGE_SHIFT)
    first, flags = _flags(m, start_pfn, nr_pages)
    offline = np.flatnonzero(flags & SECTION_IS_ONLINE == 0)
    if offline.size:
        bug(where, f"section {first + int(offline[0])} is not online")
