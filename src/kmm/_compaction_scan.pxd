# What the two scanners and the one who runs them share (mm/internal.h, mm/compaction.c).
from kmm._memmap cimport get_pageblock_skip, page_zone, section_online, set_pageblock_skip
from kmm._types cimport *

cdef enum:
    COMPACT_CLUSTER_MAX = 32        # pages that are moved in a round
    COSTLY_ORDER = 3                # PAGE_ALLOC_COSTLY_ORDER
    MIGRATE_ROOM = 1024             # of a round at most 31 pages of one pageblock and all of another
    FREE_ROOM = 2048                # as many targets, and the rest of a block of order 9

# enum migrate_mode
cdef enum:
    MIGRATE_ASYNC = 0
    MIGRATE_SYNC_LIGHT = 1
    MIGRATE_SYNC = 2

# enum compact_result
cdef enum:
    COMPACT_NOT_SUITABLE_ZONE = 0
    COMPACT_SKIPPED = 1
    COMPACT_DEFERRED = 2
    COMPACT_NO_SUITABLE_PAGE = 3
    COMPACT_CONTINUE = 4
    COMPACT_COMPLETE = 5
    COMPACT_PARTIAL_SKIPPED = 6
    COMPACT_CONTENDED = 7
    COMPACT_OK = 8                  # COMPACT_SUCCESS; here an event has that name

# Of a run, beside what it is asked for; params.py has the same numbers.
cdef enum:
    CC_IGNORE_SKIP_HINT = 1
    CC_IGNORE_BLOCK_SUITABLE = 2
    CC_DIRECT = 4
    CC_WHOLE_ZONE = 8
    CC_UNEVICTABLE = 16             # vm.compact_unevictable_allowed
    CC_FS = 32                      # __GFP_FS
    CC_PROACTIVE = 64
    CC_SIGNAL = 128                 # a fatal signal waits for who compacts

# struct compact_control
cdef struct compact_control_t:
    zone_t *zone
    int order                       # -1: compact all there is
    int search_order
    int migratetype
    int mode
    int alloc_flags
    int highest_zoneidx
    int flags                       # CC_*
    int extfrag_threshold
    int proactive_low               # the score at which a proactive run ends
    int cpu
    bint whole_zone
    bint rescan
    bint contended
    int fast_search_fail
    pfn_t migrate_pfn
    pfn_t free_pfn
    pfn_t fast_start_pfn            # all ones: was used already
    int64_t migrate_scanned
    int64_t free_scanned
    int64_t isolated
    int64_t nr_migratepages
    int64_t nr_freepages
    # Both are taken from the end: the kernel adds to and takes from the front of its lists.
    uint64_t migratepages[MIGRATE_ROOM]
    uint64_t freepages[FREE_ROOM]


cdef inline pfn_t pageblock_start_pfn(pfn_t pfn) noexcept nogil:
    return pfn & ~<pfn_t> (PAGEBLOCK_PAGES - 1)


cdef inline pfn_t pageblock_end_pfn(pfn_t pfn) noexcept nogil:
    return (pfn | (PAGEBLOCK_PAGES - 1)) + 1


cdef inline pfn_t block_end_pfn(pfn_t pfn, int order) noexcept nogil:
    return (pfn | ((<pfn_t> 1 << order) - 1)) + 1


cdef inline pfn_t zone_end_pfn(const zone_t *zone) noexcept nogil:
    return zone.zone_start_pfn + zone.spanned_pages


cdef inline bint direct_async(const compact_control_t *cc) noexcept nogil:
    return cc.flags & CC_DIRECT and cc.mode == MIGRATE_ASYNC


cdef inline bint isolation_suitable(const mem_t *mem, const compact_control_t *cc,
                                    pfn_t pfn) noexcept nogil:
    return cc.flags & CC_IGNORE_SKIP_HINT or not get_pageblock_skip(mem, pfn)


cdef inline bint pageblock_in_zone(const mem_t *mem, pfn_t start, pfn_t end,
                                   const zone_t *zone) noexcept nogil:
    """Whether the ends of a pageblock, or part of one, are online pages of a zone."""
    return (end <= mem.nr_pages and section_online(mem, start) and page_zone(mem, start) == zone)


cdef inline bint compact_scanners_met(const compact_control_t *cc) noexcept nogil:
    return cc.free_pfn >> PAGEBLOCK_ORDER <= cc.migrate_pfn >> PAGEBLOCK_ORDER


# -- the scanners ---------------------------------------------------------------------------------

# enum isolate_migrate_t
cdef enum:
    ISOLATE_ABORT = 0
    ISOLATE_NONE = 1
    ISOLATE_SUCCESS = 2

cdef int isolate_migratepages(mem_t *mem, compact_control_t *cc) noexcept nogil
cdef void isolate_freepages(mem_t *mem, compact_control_t *cc) noexcept nogil
cdef void putback_migratepages(mem_t *mem, compact_control_t *cc) noexcept nogil
cdef bint skip_persistent(const mem_t *mem, pfn_t pfn) noexcept nogil
