# What is in use in a range, and by whom (mm/page_owner.c).  Everything that looks at used pages one
# after the other steps with next_in_use, so that they agree on what a page is.
from kmm._freelist cimport block_of, is_free_head
from kmm._memmap cimport state_order
from kmm._rmap cimport *
from kmm._types cimport *

cdef enum:
    MAX_FOLIO_ORDER = 18            # a hugetlb page of 1 GiB

cdef struct in_use_t:
    uint64_t pfn
    uint64_t index                  # at its user
    uint32_t nr_pages               # 0: nothing is in use here
    uint16_t user                   # 0: nobody that is known
    uint16_t flags                  # PF_*
    uint8_t kind                    # USER_*
    uint8_t held                    # has a reference; without: offered by its driver, or free
    uint8_t compound                # one struct page speaks for all of it
    uint8_t fill                    # FILL_*, where the page has no record of its own


cdef inline bint is_compound_kind(int kind) noexcept nogil:
    """Whether pages that are not single are compound ones: of kernel stacks, tables and buffers
    only the first has a reference."""
    return (kind == USER_SLAB_RECLAIMABLE or kind == USER_SLAB_UNRECLAIMABLE
            or kind == USER_HUGETLB or on_lru_kind(kind))


cdef inline void fill_in_use(const mem_t *mem, pfn_t pfn, pfn_t nr, uint16_t flags,
                             in_use_t *row) noexcept nogil:
    cdef bint huge = nr >= PAGEBLOCK_PAGES
    row.pfn, row.nr_pages, row.flags = pfn, <uint32_t> nr, flags
    row.user = row.kind = row.fill = row.compound = 0
    row.index = 0
    row.held = True
    if flags & PF_USER:
        row.user = block_user(block_of(mem, pfn)) if huge else page_user(&mem.pages[pfn])
        row.index = block_index(mem, block_of(mem, pfn)) if huge else page_index(&mem.pages[pfn])
        row.kind = mem.users[row.user].kind
        row.compound = nr > 1 and is_compound_kind(row.kind)


cdef inline pfn_t next_in_use(const mem_t *mem, pfn_t pfn, in_use_t *row) noexcept nogil:
    """Describe what starts at a page; the pfn behind it.  Pages behind a block's first are none."""
    cdef int order = 0, fill
    cdef const pageblock_t *block = block_of(mem, pfn)
    cdef uint16_t flags
    cdef uint8_t state
    cdef pfn_t nr
    row.nr_pages = 0
    if is_free_head(mem, pfn, &order):
        return pfn + (<pfn_t> 1 << order)
    fill = block.state & BLOCK_FILL
    if (pfn & (PAGEBLOCK_PAGES - 1)) == 0 and block.kind == KIND_PCP:
        return pfn + PAGEBLOCK_PAGES
    if (pfn & (PAGEBLOCK_PAGES - 1)) == 0 and block.kind == KIND_ALLOCATED:
        nr = <pfn_t> 1 << block.order
        fill_in_use(mem, pfn, nr, block.flags | mem.pages[pfn].flags & PF_HWPOISON, row)
        return pfn + nr
    if not block.state & BLOCK_DIRTY:
        nr = PAGEBLOCK_PAGES - (pfn & (PAGEBLOCK_PAGES - 1))
        if fill != FILL_NONE:
            fill_in_use(mem, pfn, nr, 0 if fill == FILL_KERNEL else PF_RESERVED, row)
            row.fill = fill
        return pfn + nr
    state = mem.states[pfn]
    if state & STATE_PCP:
        return pfn + (<pfn_t> 1 << state_order(state))
    flags = mem.pages[pfn].flags
    if state & STATE_ALLOCATED:
        nr = <pfn_t> 1 << state_order(state)
        fill_in_use(mem, pfn, nr, flags, row)
        return pfn + nr
    if flags or fill != FILL_NONE:
        if not flags:
            row.fill = fill
            flags = 0 if fill == FILL_KERNEL else PF_RESERVED
        fill_in_use(mem, pfn, 1, flags, row)
        row.fill = FILL_NONE if mem.pages[pfn].flags else fill
        # A driver that let its reference go leaves the mark of its page.
        row.held = not flags & PF_OFFLINE
    return pfn + 1


cdef inline pfn_t head_of(const mem_t *mem, pfn_t pfn) noexcept nogil:
    """Where the block in use starts that holds a page; the page itself if it is in none."""
    cdef pfn_t head
    # Of a pageblock's first page, smaller blocks start at itself.
    cdef int order, smallest = 1 if pfn & (PAGEBLOCK_PAGES - 1) else PAGEBLOCK_ORDER + 1
    for order in range(smallest, MAX_FOLIO_ORDER + 1):
        head = pfn & ~((<pfn_t> 1 << order) - 1)
        if head == pfn:
            continue
        if (order < PAGEBLOCK_ORDER
                and mem.states[head] & ~(STATE_MARKED | STATE_ORDER) == STATE_ALLOCATED
                and mem.states[head] & STATE_ORDER >= order):
            return head
        if is_block_in_use(mem, head) and block_of(mem, head).order >= order:
            return head
    return pfn


cdef inline bint may_go_in_use(const mem_t *mem, pfn_t pfn) noexcept nogil:
    """Whether a page that is not free may go offline so: poisoned, or offered by its driver."""
    cdef uint16_t flags = mem.pages[pfn].flags
    if flags & PF_HWPOISON:
        return True
    return flags & PF_OFFLINE and not mem.states[pfn] & STATE_ALLOCATED
