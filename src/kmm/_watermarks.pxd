# What a zone's watermarks say of a request (mm/page_alloc.c).
from kmm._types cimport *


cdef inline int64_t wmark_pages(const zone_t *zone, int flags) noexcept nogil:
    cdef int which = flags & ALLOC_WMARK_MASK
    if which == WMARK_MIN:
        return zone.watermark_min + zone.watermark_boost
    if which == WMARK_LOW:
        return zone.watermark_low + zone.watermark_boost
    return zone.watermark_high + zone.watermark_boost


cdef inline int64_t pages_above(const zone_t *zone, int order, int64_t mark, int highest,
                                int flags) noexcept nogil:
    """How many pages a zone has above a mark and its reserve, once 2^order are gone."""
    cdef int64_t free = zone.nr_free_pages - ((<int64_t> 1 << order) - 1)
    if not flags & ALLOC_RESERVES:
        free -= zone.nr_reserved_highatomic
    if flags & ALLOC_MIN_RESERVE:
        mark -= mark / 2
        if flags & ALLOC_NON_BLOCK:
            mark -= mark / 4
    if flags & ALLOC_OOM:
        mark -= mark / 2
    return free - mark - zone.lowmem_reserve[highest]


cdef inline bint zone_watermark_ok(const zone_t *zone, int order, int64_t mark, int highest,
                                   int flags) noexcept nogil:
    cdef uint32_t lists
    if pages_above(zone, order, mark, highest, flags) <= 0:
        return False
    if order == 0:
        return True
    lists = zone.free_mask[0] | zone.free_mask[1] | zone.free_mask[2]
    if flags & (ALLOC_HIGHATOMIC | ALLOC_OOM):
        lists |= zone.free_mask[MIGRATE_HIGHATOMIC]
    return lists >> order != 0
