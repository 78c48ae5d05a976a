"""Huge pages as the records have them: found in a range, made of single pages, moved (mm/hugetlb.c)."""
from kmm._allocator cimport PageAllocator
from kmm._freelist cimport block_of, clear_block_record, mark_allocated, mark_dirty
from kmm._memmap cimport MemMap
from kmm._migrate cimport move_folio
from kmm._rmap cimport *
from kmm._types cimport *


cdef inline bint is_hugetlb(mem_t *mem, pfn_t pfn, folio_t *folio) noexcept nogil:
    """Whether a huge page of a pool starts at pfn, free or in use."""
    return (is_block_in_use(mem, pfn) and read_folio(mem, pfn, folio)
            and mem.users[folio.user].kind == USER_HUGETLB)


def hugetlb_heads(MemMap memmap, pfn_t start, pfn_t end):
    """Return the pfns at which huge pages of pools start in a range, upward."""
    cdef mem_t *mem = &memmap.mem
    cdef folio_t folio
    cdef pfn_t pfn = (start + PAGEBLOCK_PAGES - 1) & ~<pfn_t> (PAGEBLOCK_PAGES - 1)
    found = []
    while pfn < end and pfn < mem.nr_pages:
        if is_hugetlb(mem, pfn, &folio):
            found.append(pfn)
        pfn += PAGEBLOCK_PAGES
    return found


def mark_hugetlb(MemMap memmap, const uint64_t[::1] pfns, uint8_t[::1] out):
    """Tell which pages of a list start huge pages of pools; how many do.

    :param out: as long as the list, all zero; 1 is written for those that do.
    """
    cdef mem_t *mem = &memmap.mem
    cdef folio_t folio
    cdef int64_t i, n = 0
    if out.shape[0] != pfns.shape[0]:
        raise ValueError("mark_hugetlb: arrays of different lengths")
    with nogil:
        for i in range(pfns.shape[0]):
            if is_hugetlb(mem, pfns[i], &folio):
                out[i] = 1
                n += 1
    return n


def move_hugetlb(PageAllocator m, pfn_t pfn, pfn_t to):
    """Let a huge page that is nobody's take the place of an isolated one, which is nobody's then."""
    cdef mem_t *mem = m.mem
    cdef folio_t folio
    if not is_hugetlb(mem, pfn, &folio) or not folio.flags[0] & PF_ISOLATED:
        raise ValueError(f"move_hugetlb: pfn {pfn:#x} is no isolated huge page")
    if (not is_block_in_use(mem, to) or block_of(mem, to).flags & PF_USER
            or block_of(mem, to).order != block_of(mem, pfn).order):
        raise ValueError(f"move_hugetlb: pfn {to:#x} is no huge page of that size in nobody's hands")
    move_folio(mem, &folio, to)


def isolate_hugetlb(MemMap memmap, pfn_t pfn):
    """Keep a huge page in use from others, so that it can be moved; whether it is so now."""
    cdef folio_t folio
    if (not is_hugetlb(&memmap.mem, pfn, &folio) or not folio.flags[0] & PF_ACTIVE
            or folio.flags[0] & PF_ISOLATED):
        return False
    folio.flags[0] |= PF_ISOLATED
    return True


def prep_compound_gigantic_page(PageAllocator m, pfn_t pfn, int order):
    """Make one block of single pages in a row that were handed out, each by itself.

    :param order: 9 and up; pfn: a multiple of its size.
    :raises ValueError: if one of the pages is not in the caller's hands; nothing has changed.
    """
    cdef mem_t *mem = m.mem
    cdef pfn_t p, end = pfn + (<pfn_t> 1 << order)
    cdef int64_t bad = -1
    if not PAGEBLOCK_ORDER <= order < 32 or pfn & (end - pfn - 1) or end > mem.nr_pages:
        raise ValueError(f"prep_compound_gigantic_page: pfn {pfn:#x}, order {order}")
    with nogil:
        for p in range(pfn, end):
            if mem.states[p] != STATE_ALLOCATED:
                bad = <int64_t> p
                break
        if bad < 0:
            for p in range(pfn, end):
                mem.states[p] = STATE_NONE
            mark_allocated(mem, pfn, order)
    if bad >= 0:
        raise ValueError(f"prep_compound_gigantic_page: pfn {bad:#x} is not in the caller's hands")


def destroy_compound_gigantic_page(PageAllocator m, pfn_t pfn):
    """Make single pages of a gigantic block that is nobody's; how many."""
    cdef mem_t *mem = m.mem
    cdef pfn_t p, n
    if (not is_block_in_use(mem, pfn) or block_of(mem, pfn).flags & PF_USER
            or block_of(mem, pfn).order < MAX_ORDER):
        raise ValueError(f"destroy_compound_gigantic_page: pfn {pfn:#x}")
    n = <pfn_t> 1 << block_of(mem, pfn).order
    with nogil:
        clear_block_record(mem, pfn)
        for p in range(pfn, pfn + n, 512):
            mark_dirty(mem, p)
        for p in range(pfn, pfn + n):
            mark_allocated(mem, p, 0)
    return n
