"""References of pages beyond their users': pins, drivers that let go, broken memory.

Models what include/linux/page_ref.h and the flags of struct page tell of single pages.
"""
from kmm._memmap cimport MemMap
from kmm._page_owner cimport *
from kmm._swap cimport lru_del


def set_marks(MemMap memmap, pfn_t pfn, uint16_t marks):
    """Set PF_* marks of the block in use that starts at a page."""
    flags_of(&memmap.mem, pfn)[0] |= marks
    if not is_block_in_use(&memmap.mem, pfn):
        memmap.mem.states[pfn] |= STATE_MARKED


def clear_marks(MemMap memmap, pfn_t pfn, uint16_t marks):
    """Clear PF_* marks of the block in use that starts at a page."""
    cdef uint16_t *flags = flags_of(&memmap.mem, pfn)
    flags[0] &= ~marks
    if not is_block_in_use(&memmap.mem, pfn) and not flags[0]:
        memmap.mem.states[pfn] &= <uint8_t> ~STATE_MARKED


def marks(MemMap memmap, pfn_t pfn):
    """The PF_* marks of what starts at a page."""
    return flags_of(&memmap.mem, pfn)[0]


def is_orphan(MemMap memmap, pfn_t pfn):
    """Whether a page was pinned and has lost its user, so that it stays on its LRU list meanwhile."""
    return is_orphaned(flags_of(&memmap.mem, pfn)[0])


def count_node_stat(MemMap memmap, int nid, int item, int64_t by):
    """Move a node's counter of vmstat.NODE_STAT_ITEMS."""
    if not 0 <= nid < memmap.mem.nr_nodes or not 0 <= item < NR_NODE_STATS:
        raise ValueError(f"count_node_stat: node {nid}, item {item}")
    memmap.mem.nodes[nid].stat[item] += by


def set_references(MemMap memmap, int number, pfn_t start, pfn_t end, bint held):
    """Let a driver drop its references to its single offline pages of a range, or get them back.

    :param number: of the driver's user; held: whether it has references then.
    :return: pages whose reference changed.
    """
    cdef mem_t *mem = &memmap.mem
    cdef pfn_t pfn = start
    cdef in_use_t row
    cdef int64_t n = 0
    with nogil:
        while pfn < end:
            pfn = next_in_use(mem, pfn, &row)
            if (row.nr_pages == 1 and row.user == number and row.flags & PF_OFFLINE
                    and row.held != held):
                mem.states[row.pfn] = STATE_ALLOCATED | STATE_MARKED if held else STATE_NONE
                n += 1
    return n


def forget_users(MemMap memmap, pfn_t start, pfn_t end):
    """Take the pages of a range from their users, whose slots are empty then.

    Their other marks stay: whoever looks at the range knows broken and offered pages by them.

    :return: pages that were somebody's.
    """
    cdef mem_t *mem = &memmap.mem
    cdef pfn_t pfn = start
    cdef in_use_t row
    cdef folio_t folio = [0, 0, 0, 0, NULL]
    cdef user_t *user
    cdef uint64_t i, slots
    cdef int64_t n = 0
    with nogil:
        while pfn < end:
            pfn = next_in_use(mem, pfn, &row)
            if not row.nr_pages or not row.user or not read_folio(mem, row.pfn, &folio):
                continue
            user = mem.users[folio.user]
            if folio.flags[0] & PF_LRU:
                lru_del(mem, page_zone(mem, folio.pfn), user.kind, folio.huge, folio.flags)
            account_use(mem, page_zone(mem, folio.pfn), user, folio.huge, folio.flags[0],
                        -<int64_t> row.nr_pages)
            slots = row.nr_pages >> user.order
            for i in range(slots):
                user.slots[folio.index + i] = 0
            forget_written(user, folio.index, slots)
            user.nr_present -= <int64_t> slots
            folio.flags[0] &= ~PF_USER
            n += row.nr_pages
    return n


def delete_from_lru(MemMap memmap, pfn_t pfn):
    """Take a single page off its LRU list for good; its user keeps it."""
    cdef folio_t folio
    if read_folio(&memmap.mem, pfn, &folio) and folio.flags[0] & PF_LRU:
        lru_del(&memmap.mem, page_zone(&memmap.mem, pfn), memmap.mem.users[folio.user].kind,
                folio.huge, folio.flags)
        if folio.flags[0] & PF_MLOCKED:
            page_zone(&memmap.mem, pfn).stat[NR_MLOCK] -= 1
        folio.flags[0] &= ~(PF_ACTIVE | PF_MLOCKED)
