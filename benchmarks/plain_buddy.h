/* The yardstick: a plain binary buddy.  Doubly linked free lists in 16-byte records, orders 0 to
 * 10, no migratetypes, no per-CPU lists, no watermarks, no counters but those of the lists. */
#ifndef PLAIN_BUDDY_H
#define PLAIN_BUDDY_H
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PLAIN_ORDERS 11
#define PLAIN_NONE UINT32_MAX

typedef struct { uint32_t next, prev, free_order, used; } plain_record;
typedef struct {
    plain_record *records;
    uint32_t heads[PLAIN_ORDERS];
    uint32_t mask;
    uint64_t pages;
} plain_buddy;

static inline void plain_push(plain_buddy *b, uint32_t page, int order) {
    plain_record *r = &b->records[page];
    r->next = b->heads[order];
    r->prev = PLAIN_NONE;
    r->free_order = (uint32_t)order + 1;
    if (r->next != PLAIN_NONE) b->records[r->next].prev = page;
    b->heads[order] = page;
    b->mask |= 1u << order;
}

static inline void plain_remove(plain_buddy *b, uint32_t page, int order) {
    plain_record *r = &b->records[page];
    if (r->prev != PLAIN_NONE) b->records[r->prev].next = r->next;
    else b->heads[order] = r->next;
    if (r->next != PLAIN_NONE) b->records[r->next].prev = r->prev;
    r->free_order = 0;
    if (b->heads[order] == PLAIN_NONE) b->mask &= ~(1u << order);
}

static inline int64_t plain_alloc(plain_buddy *b, int order) {
    uint32_t mask = b->mask >> order, page;
    int o;
    if (!mask) return -1;
    o = order + __builtin_ctz(mask);
    page = b->heads[o];
    plain_remove(b, page, o);
    while (o > order) { o--; plain_push(b, page + (1u << o), o); }
    b->records[page].used = (uint32_t)order + 1;
    return page;
}

static inline int plain_free(plain_buddy *b, uint64_t pfn, int order) {
    uint32_t page = (uint32_t)pfn;
    if (b->records[page].used != (uint32_t)order + 1) return -1;
    b->records[page].used = 0;
    while (order < PLAIN_ORDERS - 1) {
        uint32_t buddy = page ^ (1u << order);
        if (buddy >= b->pages || b->records[buddy].free_order != (uint32_t)order + 1) break;
        plain_remove(b, buddy, order);
        page &= buddy;
        order++;
    }
    plain_push(b, page, order);
    return 0;
}

static inline int plain_init(plain_buddy *b, uint64_t pages) {
    uint64_t p;
    memset(b, 0, sizeof *b);
    b->records = aligned_alloc(2u << 20, (pages * sizeof(plain_record) + (2u << 20) - 1) & ~((2ull << 20) - 1));
    if (!b->records) return -1;
    memset(b->records, 0, pages * sizeof(plain_record));
    memset(b->heads, 0xff, sizeof b->heads);
    b->pages = pages;
    for (p = pages; p >= 1024; p -= 1024) plain_push(b, (uint32_t)(p - 1024), 10);
    return 0;
}
#endif
