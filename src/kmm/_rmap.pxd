# From a page to who uses it, and back (mm/rmap.c).  Everything is inlined.
#
# A page in use has no links, so its record holds its user (16 bits), its index there (34 bits) and
# the tag of its entry on an LRU list (30 bits).  A block of order 9 has them in its pageblock's
# record, whose index counts in units of 512 where its user has single pages.
from libc.string cimport memset

from kmm._freelist cimport block_of
from kmm._memmap cimport page_zone
from kmm._types cimport *
from kmm._vmstat cimport *

cdef extern from *:
    """
    #define KMM_SLOT_PRESENT ((uint64_t)1 << 62)
    #define KMM_SLOT_SWAPPED ((uint64_t)1 << 63)
    #define KMM_SLOT_HUGE ((uint64_t)1 << 61)
    #define KMM_SLOT_YOUNG ((uint64_t)1 << 60)
    #define KMM_SLOT_RECLAIM ((uint64_t)1 << 59)
    #define KMM_SLOT_PFN (((uint64_t)1 << 40) - 1)
    """
    const uint64_t SLOT_PRESENT "KMM_SLOT_PRESENT"  # the low 40 bits are its pfn
    const uint64_t SLOT_SWAPPED "KMM_SLOT_SWAPPED"  # the low 40 bits are a slot of the swap device
    const uint64_t SLOT_HUGE "KMM_SLOT_HUGE"        # part of a block of order 9
    const uint64_t SLOT_YOUNG "KMM_SLOT_YOUNG"      # touched since reclaim last looked
    const uint64_t SLOT_RECLAIM "KMM_SLOT_RECLAIM"  # to be reclaimed once it is written
    const uint64_t SLOT_PFN "KMM_SLOT_PFN"

cdef enum:
    LRU_TAG_BITS = 30
    MAX_USERS = 65536

ctypedef struct folio_t:
    pfn_t pfn
    uint64_t index                  # at its user
    int user
    int huge                        # a block of order 9 or more
    uint16_t *flags


cdef inline bint is_block_in_use(const mem_t *mem, pfn_t pfn) noexcept nogil:
    """Whether a block of order 9 or more that is handed out starts at pfn."""
    return (pfn & (PAGEBLOCK_PAGES - 1)) == 0 and block_of(mem, pfn).kind == KIND_ALLOCATED


cdef inline uint16_t *flags_of(mem_t *mem, pfn_t pfn) noexcept nogil:
    """The marks of what starts at pfn."""
    if is_block_in_use(mem, pfn):
        return &mem.blocks[pfn >> PAGEBLOCK_ORDER].flags
    return &mem.pages[pfn].flags


cdef inline bint is_orphaned(uint16_t flags) noexcept nogil:
    """Whether a page with these marks was pinned and has lost its user: it is on an LRU list until
    it is unpinned, or broken."""
    return flags & (PF_PINNED | PF_USER | PF_HWPOISON) == PF_PINNED


cdef inline int page_user(const page_t *page) noexcept nogil:
    return page.prev & 0xFF | <int> page.prev_hi << 8


cdef inline uint64_t page_index(const page_t *page) noexcept nogil:
    return page.next | <uint64_t> (page.next_hi & 3) << 32


cdef inline uint32_t page_tag(const page_t *page) noexcept nogil:
    return page.next_hi >> 2 | page.prev >> 8 << 6


cdef inline void set_page_user(page_t *page, int user, uint64_t index) noexcept nogil:
    page.next = <uint32_t> index
    page.next_hi = <uint8_t> (page.next_hi & ~3 | index >> 32)
    page.prev = page.prev & ~<uint32_t> 0xFF | (user & 0xFF)
    page.prev_hi = <uint8_t> (user >> 8)


cdef inline void set_page_tag(page_t *page, uint32_t tag) noexcept nogil:
    page.next_hi = <uint8_t> (page.next_hi & 3 | (tag & 0x3F) << 2)
    page.prev = page.prev & 0xFF | tag >> 6 << 8


cdef inline int block_user(const pageblock_t *block) noexcept nogil:
    return block.prev & 0xFF | <int> block.mt << 8


cdef inline int index_shift(const mem_t *mem, int user) noexcept nogil:
    """How many bits of an index a pageblock's record leaves out."""
    return PAGEBLOCK_ORDER if mem.users[user].order == 0 else 0


cdef inline uint64_t block_index(const mem_t *mem, const pageblock_t *block) noexcept nogil:
    return <uint64_t> (block.next & 0x3FFFFFF) << index_shift(mem, block_user(block))


cdef inline uint32_t block_tag(const pageblock_t *block) noexcept nogil:
    return block.next >> 26 | block.prev >> 8 << 6


cdef inline void set_block_user(const mem_t *mem, pageblock_t *block, int user,
                                uint64_t index) noexcept nogil:
    block.next = block.next & ~<uint32_t> 0x3FFFFFF | <uint32_t> (index >> index_shift(mem, user))
    block.prev = block.prev & ~<uint32_t> 0xFF | (user & 0xFF)
    block.mt = <uint8_t> (user >> 8)


cdef inline void set_block_tag(pageblock_t *block, uint32_t tag) noexcept nogil:
    block.next = block.next & 0x3FFFFFF | (tag & 0x3F) << 26
    block.prev = block.prev & 0xFF | tag >> 6 << 8


cdef inline bint read_folio(mem_t *mem, pfn_t pfn, folio_t *folio) noexcept nogil:
    """What starts at pfn, if somebody uses it and is known; False otherwise."""
    cdef pageblock_t *block
    folio.pfn, folio.index, folio.user, folio.huge, folio.flags = pfn, 0, 0, 0, NULL
    if pfn >= mem.nr_pages:
        return False
    folio.huge = is_block_in_use(mem, pfn)
    folio.flags = flags_of(mem, pfn)
    if not folio.flags[0] & PF_USER:
        return False
    if folio.huge:
        block = block_of(mem, pfn)
        folio.user, folio.index = block_user(block), block_index(mem, block)
    else:
        folio.user, folio.index = page_user(&mem.pages[pfn]), page_index(&mem.pages[pfn])
    return True


cdef inline uint64_t token_of(uint64_t seed, uint64_t index) noexcept nogil:
    """What the page of an index holds at a user whose tokens follow from a seed; never 0."""
    cdef uint64_t z = seed + index * <uint64_t> 0x9E3779B97F4A7C15
    z = (z ^ z >> 30) * <uint64_t> 0xBF58476D1CE4E5B9
    z = (z ^ z >> 27) * <uint64_t> 0x94D049BB133111EB
    return (z ^ z >> 31) | 1


cdef inline void forget_written(user_t *user, uint64_t index, uint64_t n) noexcept nogil:
    """Note that slots have no content any more that could be lost."""
    if user.written != NULL:
        memset(&user.written[index], 0, n)


cdef inline uint32_t folio_tag(const mem_t *mem, const folio_t *folio) noexcept nogil:
    if folio.huge:
        return block_tag(block_of(mem, folio.pfn))
    return page_tag(&mem.pages[folio.pfn])


cdef inline bint swap_backed(int kind) noexcept nogil:
    return kind == USER_ANON or kind == USER_SHMEM


cdef inline bint on_lru_kind(int kind) noexcept nogil:
    return kind == USER_ANON or kind == USER_SHMEM or kind == USER_FILE


cdef inline int lru_of(int kind, uint16_t flags) noexcept nogil:
    """The list of a page by its user's kind and its marks (folio_lru_list)."""
    if flags & PF_MLOCKED:
        return LRU_UNEVICTABLE
    return (0 if swap_backed(kind) else 2) + ((flags & PF_ACTIVE) != 0)


cdef inline void lru_size_add(mem_t *mem, zone_t *zone, int lru, int64_t pages) noexcept nogil:
    zone.stat[NR_ZONE_INACTIVE_ANON + lru] += pages
    mem.nodes[zone.nid].stat[NR_INACTIVE_ANON + lru] += pages


cdef inline void node_stat_add(mem_t *mem, const zone_t *zone, int item,
                               int64_t by) noexcept nogil:
    mem.nodes[zone.nid].stat[item] += by


cdef inline void account_use(mem_t *mem, zone_t *zone, user_t *user, bint huge,
                             uint16_t flags, int64_t pages) noexcept nogil:
    """Count pages that begin to be used so, or with a minus end to; not what LRU lists count."""
    cdef int64_t *stat = mem.nodes[zone.nid].stat
    cdef int kind = user.kind
    if kind == USER_ANON:
        stat[NR_ANON_PAGES] += pages
        if huge:
            stat[NR_ANON_TRANSPARENT_HUGEPAGES] += pages
    elif kind == USER_SHMEM or kind == USER_FILE:
        stat[NR_FILE_PAGES] += pages
        if kind == USER_SHMEM:
            stat[NR_SHMEM] += pages
        if user.mapped:
            stat[NR_MAPPED] += pages
        if flags & PF_DIRTY and kind == USER_FILE:
            stat[NR_DIRTY] += pages
            user.nr_dirty += pages
            zone.stat[NR_ZONE_WRITE_PENDING] += pages
        if flags & PF_WRITEBACK:
            stat[NR_WRITEBACK] += pages
            zone.stat[NR_ZONE_WRITE_PENDING] += pages
    elif kind == USER_SLAB_RECLAIMABLE:
        stat[NR_SLAB_RECLAIMABLE] += pages
    elif kind == USER_SLAB_UNRECLAIMABLE:
        stat[NR_SLAB_UNRECLAIMABLE] += pages
    elif kind == USER_STACK:
        stat[NR_KERNEL_STACK] += 4 * pages
    elif kind == USER_PAGE_TABLE:
        stat[NR_PAGE_TABLE_PAGES] += pages
    if flags & PF_MLOCKED:
        zone.stat[NR_MLOCK] += pages


cdef inline int64_t pages_of_use(const folio_t *folio) noexcept nogil:
    """Pages of what a user has for an index: 1, or 512."""
    return PAGEBLOCK_PAGES if folio.huge else 1


cdef inline void count_dirty(mem_t *mem, zone_t *zone, user_t *user, int64_t pages) noexcept nogil:
    """Count pages of a file that its backing store no longer has, or with a minus has again."""
    user.nr_dirty += pages
    node_stat_add(mem, zone, NR_DIRTY, pages)
    zone.stat[NR_ZONE_WRITE_PENDING] += pages


cdef inline void set_page_dirty(mem_t *mem, const folio_t *folio) noexcept nogil:
    cdef zone_t *zone
    if not folio.flags[0] & PF_DIRTY:
        folio.flags[0] |= PF_DIRTY
        if mem.users[folio.user].kind == USER_FILE:
            zone = page_zone(mem, folio.pfn)
            count_dirty(mem, zone, mem.users[folio.user], pages_of_use(folio))
            node_stat_add(mem, zone, NR_DIRTIED, pages_of_use(folio))


cdef inline int64_t folio_nr_pages(const mem_t *mem, const folio_t *folio) noexcept nogil:
    """How many pages from its first on the block has."""
    if folio.huge:
        return <int64_t> 1 << block_of(mem, folio.pfn).order
    return <int64_t> 1 << (mem.states[folio.pfn] & STATE_ORDER)


cdef inline void count_isolated(mem_t *mem, const folio_t *folio, int64_t by) noexcept nogil:
    cdef int kind = mem.users[folio.user].kind
    if on_lru_kind(kind):
        node_stat_add(mem, page_zone(mem, folio.pfn),
                      NR_ISOLATED_ANON if swap_backed(kind) else NR_ISOLATED_FILE, by)
