"""What each page is, for /proc/kpageflags and /proc/pagetypeinfo, of terabytes at a time.

Everything is told by the largest record that can: a section that is not online, a pageblock that
is free or was never written to, a page.
"""
from libc.string cimport memset

from kmm._freelist cimport block_of
from kmm._memmap cimport MemMap, get_pageblock_migratetype, section_online, state_order
from kmm._rmap cimport block_user, on_lru_kind, page_user
from kmm._types cimport *

# The words of /proc/kpageflags.
cdef enum:
    KPF_REFERENCED = 1 << 2
    KPF_UPTODATE = 1 << 3
    KPF_DIRTY = 1 << 4
    KPF_LRU = 1 << 5
    KPF_ACTIVE = 1 << 6
    KPF_SLAB = 1 << 7
    KPF_WRITEBACK = 1 << 8
    KPF_BUDDY = 1 << 10
    KPF_MMAP = 1 << 11
    KPF_ANON = 1 << 12
    KPF_SWAPBACKED = 1 << 14
    KPF_COMPOUND_HEAD = 1 << 15
    KPF_COMPOUND_TAIL = 1 << 16
    KPF_HUGE = 1 << 17
    KPF_UNEVICTABLE = 1 << 18
    KPF_HWPOISON = 1 << 19
    KPF_NOPAGE = 1 << 20
    KPF_THP = 1 << 22
    KPF_OFFLINE = 1 << 23
    KPF_PGTABLE = 1 << 26

cdef uint64_t KPF_RESERVED = <uint64_t> 1 << 32
cdef uint64_t KPF_MLOCKED = <uint64_t> 1 << 33
# Of a file's page; of an anonymous one the same bit says that nobody shares it.
cdef uint64_t KPF_MAPPEDTODISK = <uint64_t> 1 << 34
cdef uint64_t KPF_PRIVATE = <uint64_t> 1 << 35   # a file's page with buffers, as writing makes them
cdef uint64_t KPF_OWNER_PRIVATE = <uint64_t> 1 << 37

cdef extern from *:
    """
    #define kmm_prefetch_read(p) __builtin_prefetch((const void *)(p), 0)
    """
    void prefetch_read "kmm_prefetch_read"(const void *p) noexcept nogil

cdef enum:
    # What is fetched before it is needed.
    AHEAD = 16                      # sections, of which the first pageblock's record is read
    MAX_FOLIO_ORDER = 18            # of a huge page of 1 GiB
    RECORDS_AHEAD = 256             # pageblocks, read one after the other


# -- pageblocks ---------------------------------------------------------------------------------

def pageblock_counts(MemMap memmap, pfn_t start, pfn_t end, int zone_index):
    """Count a zone's pageblocks of online sections in a range by migratetype."""
    cdef int64_t counts[8]
    cdef pfn_t section = start >> SECTION_PFN_SHIFT
    cdef const mem_t *mem = &memmap.mem
    memset(counts, 0, sizeof(counts))
    with nogil:
        while section << SECTION_PFN_SHIFT < end:
            prefetch_read(
                &mem.blocks[(section + AHEAD) << (SECTION_PFN_SHIFT - PAGEBLOCK_ORDER)])
            if mem.sections[section].flags & SECTION_IS_ONLINE:
                count_pageblocks(mem, section, start, end, zone_index, counts)
            section += 1
    return [counts[mt] for mt in range(MIGRATE_TYPES)]


cdef void count_pageblocks(const mem_t *mem, pfn_t section, pfn_t start, pfn_t end,
                           int zone_index, int64_t *counts) noexcept nogil:
    cdef const section_t *s = &mem.sections[section]
    cdef pfn_t pfn = section << SECTION_PFN_SHIFT, stop = pfn + SECTION_PAGES
    cdef bint whole = start <= pfn and stop <= end and not s.flags & SECTION_IS_EARLY
    cdef int zone = mem.blocks[pfn >> PAGEBLOCK_ORDER].zone
    # Only at boot does a section lie in more than one zone; of others the first record tells.
    whole = whole and zone != 0
    if whole and zone != zone_index + 1:
        return
    if whole:
        count_types(s, counts)
        return
    pfn = max(pfn, start & ~<pfn_t> (PAGEBLOCK_PAGES - 1))
    stop = min(stop, end)
    while pfn < stop:
        if mem.blocks[pfn >> PAGEBLOCK_ORDER].zone == zone_index + 1:
            counts[get_pageblock_migratetype(mem, pfn)] += 1
        pfn += PAGEBLOCK_PAGES


cdef inline void count_types(const section_t *s, int64_t *counts) noexcept nogil:
    """Count the pageblocks of a section by type, 16 at once where they are alike."""
    cdef int i, shift
    cdef uint64_t word
    for i in range(4):
        word = s.pageblock_flags[i]
        if word == (word & 0xF) * <uint64_t> 0x1111111111111111:
            counts[word & 7] += 16
            continue
        for shift in range(0, 64, 4):
            counts[word >> shift & 7] += 1


# -- page flags -----------------------------------------------------------------------------------

def kpageflags(MemMap memmap, pfn_t start, uint64_t[::1] out):
    """Fill out with the /proc/kpageflags words of the pages from start on."""
    cdef pfn_t count = out.shape[0]
    if count:
        with nogil:
            fill_kpageflags(&memmap.mem, start, count, &out[0])


def kpageflags_runs(MemMap memmap, pfn_t start, pfn_t end, uint64_t[::1] lengths,
                    uint64_t[::1] words):
    """Fill two arrays with runs of pages that have the same /proc/kpageflags word.

    :return: how many runs there were room for, and the pfn behind the last.
    """
    cdef int64_t n = 0
    cdef pfn_t pfn
    if lengths.shape[0] == 0 or words.shape[0] != lengths.shape[0]:
        raise ValueError("kpageflags_runs: two arrays of the same length needed")
    with nogil:
        pfn = fill_runs(&memmap.mem, start, end, &lengths[0], &words[0], &n, lengths.shape[0])
    return n, pfn


cdef inline uint64_t _fill_word(int fill) noexcept nogil:
    """What pages show that have no record of their own."""
    if fill == FILL_RESERVED:
        return KPF_RESERVED
    if fill == FILL_VMEMMAP:
        return KPF_RESERVED | KPF_OWNER_PRIVATE
    return 0


# -- pages of users

cdef inline uint64_t _marks_word(uint16_t flags) noexcept nogil:
    """What a block's first page shows of its marks."""
    cdef uint64_t word = 0
    if flags & PF_REFERENCED:
        word |= KPF_REFERENCED
    if flags & PF_DIRTY:
        word |= KPF_DIRTY
    if flags & PF_LRU:
        word |= KPF_LRU
    if flags & PF_ACTIVE:
        word |= KPF_ACTIVE
    if flags & PF_WRITEBACK:
        word |= KPF_WRITEBACK
    if flags & PF_MLOCKED:
        word |= KPF_MLOCKED | KPF_UNEVICTABLE
    if flags & PF_HWPOISON:
        word |= KPF_HWPOISON
    if flags & PF_OFFLINE:
        word |= KPF_OFFLINE
    return word


cdef inline bint _is_compound(int kind, int order) noexcept nogil:
    """Whether a block's pages know each other; those of others are single pages in a row."""
    return order > 0 and (on_lru_kind(kind) or kind == USER_SLAB_RECLAIMABLE
                          or kind == USER_SLAB_UNRECLAIMABLE or kind == USER_HUGETLB)


cdef uint64_t _kind_word(const user_t *user, uint16_t flags, bint tail) noexcept nogil:
    """What the pages of a kind show, beside marks and their place in a block."""
    cdef int kind = user.kind
    cdef uint64_t word = 0
    if kind == USER_ANON or kind == USER_HUGETLB and flags & PF_ACTIVE:
        word = KPF_MMAP | KPF_ANON
        if not tail:
            word |= KPF_UPTODATE | KPF_MAPPEDTODISK
            if kind == USER_ANON:
                word |= KPF_SWAPBACKED
    elif kind == USER_SHMEM or kind == USER_FILE:
        word = KPF_MMAP if user.mapped else 0
        if not tail:
            word |= KPF_UPTODATE
            if kind == USER_SHMEM:
                word |= KPF_SWAPBACKED
            elif flags & (PF_DIRTY | PF_WRITEBACK):
                word |= KPF_PRIVATE
            else:
                word |= KPF_MAPPEDTODISK
    elif kind == USER_SLAB_RECLAIMABLE or kind == USER_SLAB_UNRECLAIMABLE:
        word = KPF_SLAB
    elif kind == USER_PAGE_TABLE and not tail:
        word = KPF_PGTABLE
    return word


cdef uint64_t _user_word(const user_t *user, uint16_t flags, int order, bint tail) noexcept nogil:
    """What a page of a user's block of an order shows."""
    cdef int kind = user.kind
    cdef uint64_t word = _kind_word(user, flags, tail)
    if kind == USER_HUGETLB:
        word |= KPF_HUGE
    elif not tail:
        word |= _marks_word(flags)
    if kind == USER_OFFLINE:
        word |= KPF_OFFLINE
    if _is_compound(kind, order):
        word |= KPF_COMPOUND_TAIL if tail else KPF_COMPOUND_HEAD
        if on_lru_kind(kind):
            word |= KPF_THP
    return word


cdef inline int64_t _used_block(const mem_t *mem, pfn_t pfn) noexcept nogil:
    """The first page of the user's block of order 9 or more that holds a page; -1 for none."""
    cdef const pageblock_t *block = block_of(mem, pfn)
    cdef int order
    cdef pfn_t head
    if block.kind == KIND_BUDDY or block.kind == KIND_PCP or block.state & BLOCK_FILL:
        return -1
    for order in range(PAGEBLOCK_ORDER, MAX_FOLIO_ORDER + 1):
        head = pfn & ~((<pfn_t> 1 << order) - 1)
        block = block_of(mem, head)
        if block.kind == KIND_ALLOCATED:
            return <int64_t> head if block.order >= order and block.flags & PF_USER else -1
    return -1


cdef void _used_block_words(const mem_t *mem, pfn_t head, pfn_t pfn, pfn_t count,
                            uint64_t *out) noexcept nogil:
    """Fill the words of some pages of a user's block of order 9 or more, within a pageblock."""
    cdef const pageblock_t *block = block_of(mem, head)
    cdef const user_t *user = mem.users[block_user(block)]
    cdef uint64_t word = _user_word(user, block.flags, block.order, True)
    cdef bint written = block_of(mem, pfn).state & BLOCK_DIRTY != 0
    cdef pfn_t i
    for i in range(count):
        out[i] = word
        if written and mem.pages[pfn + i].flags & PF_HWPOISON:
            out[i] |= KPF_HWPOISON
    if head == pfn:
        out[0] = (_user_word(user, block.flags, block.order, False)
                  | (out[0] & KPF_HWPOISON))


# -- all pages

cdef uint64_t _page_word(const page_t *page, uint8_t state, int fill) noexcept nogil:
    cdef uint64_t word = 0
    if page.flags == 0 and state == STATE_NONE:
        return _fill_word(fill)
    if page.flags & PF_RESERVED:
        word |= KPF_RESERVED
    if page.flags & PF_OWNER_PRIV:
        word |= KPF_OWNER_PRIVATE
    if page.flags & PF_SLAB:
        word |= KPF_SLAB
    if page.flags & PF_LRU:
        word |= KPF_LRU
    if page.flags & PF_HWPOISON:
        word |= KPF_HWPOISON
    if page.flags & PF_OFFLINE:
        word |= KPF_OFFLINE
    return word


cdef inline pfn_t _uniform_run(const mem_t *mem, pfn_t pfn, pfn_t end,
                               uint64_t *word) noexcept nogil:
    """How many pages from pfn on show one word, as far as larger records than theirs tell.

    0 in a pageblock of which pages have records.  Those of others are never read, so that the
    host does not have to make pages of zeros for them.
    """
    cdef pfn_t stop = (pfn | (PAGEBLOCK_PAGES - 1)) + 1, section_end
    cdef const pageblock_t *block
    if pfn >= mem.nr_pages:
        word[0] = KPF_NOPAGE
        return end - pfn
    if not section_online(mem, pfn):
        word[0] = KPF_NOPAGE
        stop = (pfn | (SECTION_PAGES - 1)) + 1
        return (stop if stop < end else end) - pfn
    block = &mem.blocks[pfn >> PAGEBLOCK_ORDER]
    if block.kind == KIND_BUDDY:
        word[0] = KPF_BUDDY
        stop = (pfn & ~<pfn_t> (PAGEBLOCK_PAGES - 1)) + (<pfn_t> 1 << block.order)
        # Free blocks come in long rows.
        section_end = (pfn | (SECTION_PAGES - 1)) + 1
        while stop < section_end and mem.blocks[stop >> PAGEBLOCK_ORDER].kind == KIND_BUDDY:
            prefetch_read(&mem.blocks[(stop >> PAGEBLOCK_ORDER) + RECORDS_AHEAD])
            stop += <pfn_t> 1 << mem.blocks[stop >> PAGEBLOCK_ORDER].order
    elif _upper_half_of_max_order(mem, pfn):
        word[0] = KPF_BUDDY
    elif not block.state & BLOCK_DIRTY and _used_block(mem, pfn) < 0:
        word[0] = _fill_word(block.state & BLOCK_FILL)
    else:
        return 0
    return (stop if stop < end else end) - pfn


cdef pfn_t _small_block_words(const mem_t *mem, pfn_t head, pfn_t pfn, pfn_t end,
                              uint64_t *out) noexcept nogil:
    """Fill the words of a user's block below order 9, where they are wanted; the pfn behind it."""
    cdef const page_t *page = &mem.pages[head]
    cdef const user_t *user = mem.users[page_user(page)]
    cdef int order = state_order(mem.states[head])
    cdef uint64_t tail = _user_word(user, page.flags, order, True) if order else 0
    cdef pfn_t p = head, behind = head + (<pfn_t> 1 << order)
    if head >= pfn:
        out[head - pfn] = _user_word(user, page.flags, order, False)
    p = max(head + 1, pfn)
    while p < behind and p < end:
        out[p - pfn] = tail
        p += 1
    return behind


cdef void fill_kpageflags(const mem_t *mem, pfn_t start, pfn_t count, uint64_t *out) noexcept nogil:
    cdef pfn_t pfn = start, end = start + count, n, j
    cdef uint64_t word = 0
    while pfn < end:
        n = _uniform_run(mem, pfn, end, &word)
        if n:
            for j in range(n):
                out[pfn - start + j] = word
        else:
            n = min((pfn | (PAGEBLOCK_PAGES - 1)) + 1, end) - pfn
            _kpageflags_block(mem, pfn, n, &out[pfn - start])
        pfn += n


cdef inline bint _add_run(uint64_t length, uint64_t word, uint64_t *lengths, uint64_t *words,
                          int64_t *n, int64_t room) noexcept nogil:
    """Put a run behind n others; whether there was room."""
    if n[0] and words[n[0] - 1] == word:
        lengths[n[0] - 1] += length
        return True
    if n[0] == room:
        return False
    lengths[n[0]], words[n[0]] = length, word
    n[0] += 1
    return True


cdef pfn_t fill_runs(const mem_t *mem, pfn_t pfn, pfn_t end, uint64_t *lengths,
                     uint64_t *words, int64_t *n, int64_t room) noexcept nogil:
    """Fill runs until the room is used up; the pfn behind the last of them."""
    cdef uint64_t page_words[PAGEBLOCK_PAGES]
    cdef uint64_t word = 0
    cdef pfn_t length, j
    while pfn < end:
        length = _uniform_run(mem, pfn, end, &word)
        if length:
            if not _add_run(length, word, lengths, words, n, room):
                return pfn
            pfn += length
            continue
        length = min((pfn | (PAGEBLOCK_PAGES - 1)) + 1, end) - pfn
        _kpageflags_block(mem, pfn, length, page_words)
        for j in range(length):
            if not _add_run(1, page_words[j], lengths, words, n, room):
                return pfn + j
        pfn += length
    return pfn


cdef bint _upper_half_of_max_order(const mem_t *mem, pfn_t pfn) noexcept nogil:
    cdef pfn_t b = pfn >> PAGEBLOCK_ORDER
    return (b & 1) and mem.blocks[b - 1].kind == KIND_BUDDY and mem.blocks[b - 1].order == 10


cdef void _kpageflags_block(const mem_t *mem, pfn_t pfn, pfn_t count, uint64_t *out) noexcept nogil:
    # From the pageblock's start, because a free block's tail pages show as free too.
    cdef pfn_t base = pfn & ~<pfn_t>(PAGEBLOCK_PAGES - 1), p = base, q, end = pfn + count
    cdef int fill = mem.blocks[pfn >> PAGEBLOCK_ORDER].state & BLOCK_FILL
    cdef int64_t head = _used_block(mem, pfn)
    cdef uint64_t word
    if head >= 0:
        _used_block_words(mem, <pfn_t> head, pfn, count, out)
        return
    while p < end:
        if mem.states[p] & STATE_BUDDY:
            word, q = KPF_BUDDY, p + (<pfn_t> 1 << state_order(mem.states[p]))
        elif mem.states[p] & STATE_MARKED and mem.pages[p].flags & PF_USER:
            p = _small_block_words(mem, p, pfn, end, out)
            continue
        else:
            word, q = _page_word(&mem.pages[p], mem.states[p], fill), p + 1
        while p < q and p < end:
            if p >= pfn:
                out[p - pfn] = word
            p += 1
