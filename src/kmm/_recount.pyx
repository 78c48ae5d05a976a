"""Recounts of memory in use: one pass over slots, LRU lists and the records of pages.

What the engine counts as it goes along is not read here, because it is compared with what this
finds.  Records may be nonsense: whatever they name is looked up only if it exists.
"""
import numpy as np

from kmm._freelist cimport prefetch
from kmm._memmap cimport MemMap, section_online
from kmm._memory cimport PageUser
from kmm._rmap cimport *
from kmm._types cimport *

cdef enum:
    # What may be wrong with a slot.
    SLOT_NO_PLACE = 0               # neither present nor swapped, or both
    SLOT_NO_USER = 1                # its page's record names nobody
    SLOT_OTHER_USER = 2
    SLOT_OTHER_SIZE = 3
    NR_SLOT_FAULTS = 4
    # And with a page.
    PAGE_ORDER_WRONG = 0
    PAGE_NOT_HELD = 1
    PAGE_ISOLATED = 2
    PAGE_UNLISTED = 3
    PAGE_LISTED = 4                 # it is of a kind that no list is for
    NR_PAGE_FAULTS = 5
    # Pages that add to the same counters: 16 kinds, mapped or not, huge or not, five marks.
    NR_CLASSES = 2048
    NR_MARKS = 5
    AHEAD = 16                      # where slots and pages lie far apart, the host fetches ahead

cdef uint16_t[NR_MARKS] MARKS = [PF_LRU, PF_ACTIVE, PF_MLOCKED, PF_DIRTY, PF_WRITEBACK]

# What the record of a page in use says, and what its user is.
cdef struct use_t:
    pfn_t pfn
    uint64_t index
    uint32_t tag
    int user
    int user_order
    int kind
    int mapped
    int huge                        # the record is its pageblock's
    int order
    uint16_t flags

cdef struct slots_t:
    int64_t nr_present
    int64_t nr_swapped
    int64_t first[NR_SLOT_FAULTS]   # slot, or -1

cdef struct pages_t:
    int64_t first[NR_PAGE_FAULTS]   # pfn, or -1
    int64_t *missing                # per node and list: the first page without entry, or -1
    int64_t *classes                # per zone: pages of each class
    uint64_t *seen                  # a bit a page: it has an entry that counts


cdef inline void fill_use(const mem_t *mem, pfn_t pfn, int user, use_t *use) noexcept nogil:
    cdef const user_t *u = mem.users[user] if 0 < user < mem.nr_users else NULL
    use.pfn, use.user = pfn, user
    use.user_order = use.kind = use.mapped = 0
    if u != NULL:
        use.user_order, use.kind, use.mapped = u.order, u.kind, u.mapped != 0


cdef inline bint read_block(const mem_t *mem, pfn_t pfn, use_t *use) noexcept nogil:
    """What the record of a pageblock says; False if of nobody's use."""
    cdef const pageblock_t *block = &mem.blocks[pfn >> PAGEBLOCK_ORDER]
    if block.kind != KIND_ALLOCATED or not block.flags & PF_USER:
        return False
    fill_use(mem, pfn, block_user(block), use)
    use.index = block.next & 0x3FFFFFF
    if use.user_order == 0:
        use.index <<= PAGEBLOCK_ORDER
    use.tag, use.flags, use.huge, use.order = block_tag(block), block.flags, 1, block.order
    return True


cdef inline bint read_page(const mem_t *mem, pfn_t pfn, use_t *use) noexcept nogil:
    """What the record of a page says, the same."""
    cdef const page_t *page = &mem.pages[pfn]
    if not page.flags & PF_USER:
        return False
    fill_use(mem, pfn, page_user(page), use)
    use.index, use.tag, use.flags = page_index(page), page_tag(page), page.flags
    use.huge, use.order = 0, mem.states[pfn] & STATE_ORDER
    return True


cdef inline bint find_use(const mem_t *mem, pfn_t pfn, use_t *use) noexcept nogil:
    """Look up who uses what starts at a page."""
    if pfn >= mem.nr_pages or not section_online(mem, pfn):
        return False
    if pfn & (PAGEBLOCK_PAGES - 1) == 0 and read_block(mem, pfn, use):
        return True
    return (mem.blocks[pfn >> PAGEBLOCK_ORDER].state & BLOCK_DIRTY != 0
            and read_page(mem, pfn, use))


cdef inline void expect_page(const mem_t *mem, pfn_t pfn) noexcept nogil:
    """Have the host fetch a page's record."""
    if pfn < mem.nr_pages:
        prefetch(&mem.pages[pfn])


cdef inline void expect_slot(const mem_t *mem, pfn_t pfn) noexcept nogil:
    """Have the host fetch the slot that a page's record names."""
    cdef const page_t *page = &mem.pages[pfn]
    cdef int user = page_user(page)
    if (page.flags & PF_USER and user < mem.nr_users and mem.users[user] != NULL
            and page_index(page) < mem.users[user].nr_slots):
        prefetch(&mem.users[user].slots[page_index(page)])


cdef inline int list_of(const use_t *use) noexcept nogil:
    if use.flags & PF_MLOCKED:
        return LRU_UNEVICTABLE
    return 2 * (use.kind == USER_FILE) + (use.flags & PF_ACTIVE != 0)


cdef inline int zone_of(const mem_t *mem, pfn_t pfn) noexcept nogil:
    """The zone's place in the table, -1 if there is none."""
    cdef int zone = mem.blocks[pfn >> PAGEBLOCK_ORDER].zone - 1
    return zone if 0 <= zone < mem.nr_zones and mem.zones[zone] != NULL else -1


cdef inline int node_of(const mem_t *mem, pfn_t pfn) noexcept nogil:
    cdef int zone = zone_of(mem, pfn)
    return mem.zones[zone].nid if zone >= 0 else -1


cdef inline void note(int64_t *first, int64_t at) noexcept nogil:
    if first[0] < 0:
        first[0] = at


cdef inline void check_slot(const mem_t *mem, int user, uint64_t index, uint64_t slot,
                            slots_t *out) noexcept nogil:
    """Whether the page of a slot says that it is that slot's."""
    cdef pfn_t pfn = slot & SLOT_PFN
    cdef uint64_t head = index, inside = 0
    cdef bint huge = slot & SLOT_HUGE != 0
    cdef use_t use
    if huge:
        inside = pfn & (PAGEBLOCK_PAGES - 1)
        head -= inside
    if not find_use(mem, pfn - inside, &use):
        note(&out.first[SLOT_NO_USER], index)
    elif use.user != user or use.index != head:
        note(&out.first[SLOT_OTHER_USER], index)
    elif (huge or use.user_order >= PAGEBLOCK_ORDER) != (use.huge != 0):
        note(&out.first[SLOT_OTHER_SIZE], index)


cdef void count_slots(const mem_t *mem, int number, slots_t *out) noexcept nogil:
    cdef const user_t *user = mem.users[number]
    cdef uint64_t at, slot
    cdef bint present, swapped
    for at in range(user.nr_slots):
        slot = user.slots[at]
        if at + AHEAD < user.nr_slots:
            expect_page(mem, user.slots[at + AHEAD] & SLOT_PFN)
        if not slot:
            continue
        present, swapped = slot & SLOT_PRESENT != 0, slot & SLOT_SWAPPED != 0
        if present == swapped:
            note(&out.first[SLOT_NO_PLACE], at)
        out.nr_present += present
        out.nr_swapped += swapped
        if present:
            check_slot(mem, number, at, slot, out)


cdef bint is_held(const mem_t *mem, const use_t *use) noexcept nogil:
    """Whether the slots of a page's user hold it: 512 of them where it has single pages."""
    cdef const user_t *user = mem.users[use.user] if 0 < use.user < mem.nr_users else NULL
    cdef bint parts = use.huge and use.user_order == 0
    cdef uint64_t i, n = PAGEBLOCK_PAGES if parts else 1
    cdef uint64_t bits = SLOT_PRESENT | SLOT_HUGE | SLOT_PFN
    cdef uint64_t want = SLOT_PRESENT | use.pfn
    if parts:
        want |= SLOT_HUGE
    if user == NULL or use.index + n > user.nr_slots:
        return False
    for i in range(n):
        if user.slots[use.index + i] & bits != want + i:
            return False
    return True


cdef inline int64_t class_of(const use_t *use) noexcept nogil:
    cdef int64_t key = (use.kind & 0xF) << 2 | use.mapped << 1 | use.huge
    cdef int i
    for i in range(NR_MARKS):
        key = key << 1 | (use.flags & MARKS[i] != 0)
    return key


cdef inline void count_use(const mem_t *mem, const use_t *use, pages_t *out) noexcept nogil:
    """Add a page to what is counted, and note what is wrong with it."""
    cdef bint parts = use.huge and use.user_order == 0
    cdef bint listed = on_lru_kind(use.kind)
    cdef int zone = zone_of(mem, use.pfn), lru = list_of(use)
    if (use.order != (PAGEBLOCK_ORDER if parts else use.user_order)
            or not use.huge and mem.states[use.pfn] != (STATE_MARKED | STATE_ALLOCATED
                                                        | use.user_order)):
        note(&out.first[PAGE_ORDER_WRONG], use.pfn)
    if not is_held(mem, use):
        note(&out.first[PAGE_NOT_HELD], use.pfn)
    if use.flags & PF_ISOLATED:
        note(&out.first[PAGE_ISOLATED], use.pfn)
    # A broken page is taken off its list, also where its file keeps it.
    if listed and not use.flags & (PF_LRU | PF_HWPOISON):
        note(&out.first[PAGE_UNLISTED], use.pfn)
    if not listed and use.flags & PF_LRU:
        note(&out.first[PAGE_LISTED], use.pfn)
    if zone < 0:
        return
    if (listed and use.flags & PF_LRU and lru < NR_LRU_LISTS
            and not out.seen[use.pfn >> 6] >> (use.pfn & 63) & 1):
        note(&out.missing[mem.zones[zone].nid * NR_LRU_LISTS + lru], use.pfn)
    out.classes[zone * NR_CLASSES + class_of(use)] += <int64_t> 1 << (use.order & 63)


cdef void count_section(const mem_t *mem, pfn_t start, pages_t *out) noexcept nogil:
    cdef pfn_t block = start, pfn
    cdef use_t use
    while block < start + SECTION_PAGES:
        if read_block(mem, block, &use):
            count_use(mem, &use, out)
        if mem.blocks[block >> PAGEBLOCK_ORDER].state & BLOCK_DIRTY:
            for pfn in range(block, block + PAGEBLOCK_PAGES):
                if pfn + AHEAD < block + PAGEBLOCK_PAGES:
                    expect_slot(mem, pfn + AHEAD)
                if read_page(mem, pfn, &use):
                    count_use(mem, &use, out)
        block += PAGEBLOCK_PAGES


cdef uint64_t LRU_PFN = (<uint64_t> 1 << 34) - 1  # of an entry, its tag is above


cdef int64_t count_entries(const mem_t *mem, int nid, int which, uint64_t *seen) noexcept nogil:
    """Count the entries of a list that are what their page's record says, one a page, and mark
    the pages."""
    cdef const lru_list_t *lst = &mem.nodes[nid].lru[which]
    cdef uint64_t at, entry
    cdef int64_t n = 0
    cdef pfn_t pfn
    cdef use_t use
    for at in range(lst.tail, lst.head):
        if at + AHEAD < lst.head:
            expect_page(mem, lst.ring[(at + AHEAD) & (lst.room - 1)] & LRU_PFN)
        entry = lst.ring[at & (lst.room - 1)]
        pfn = entry & LRU_PFN
        if (find_use(mem, pfn, &use) and use.tag == entry >> 34 and use.flags & PF_LRU
                and list_of(&use) == which and node_of(mem, pfn) == nid
                and not seen[pfn >> 6] >> (pfn & 63) & 1):
            seen[pfn >> 6] |= <uint64_t> 1 << (pfn & 63)
            n += 1
    return n


cdef class Recount:
    """A recount of a machine's memory in use; lists come before pages.  All of it without the GIL.

    :param memmap: whose records, users and lists are read; nothing is written.
    """

    cdef MemMap memmap
    cdef uint64_t[::1] seen

    def __init__(self, MemMap memmap not None):
        cdef const mem_t *mem = &memmap.mem
        cdef pfn_t end = mem.nr_pages
        while end and not section_online(mem, end - SECTION_PAGES):
            end -= SECTION_PAGES
        self.memmap = memmap
        self.seen = np.zeros((end >> 6) + 1, dtype=np.uint64)

    def slots(self, PageUser user not None):
        """Count one user's slots and compare them with the records of their pages.

        :return: how many have a page; how many are swapped; the first slot (-1 for none) that has
            no one place, whose page's record names no user, whose names another user or index,
            and whose page is of another size than the slot says.
        :raises ValueError: if the user has ended.
        """
        cdef slots_t out
        cdef const mem_t *mem = &self.memmap.mem
        cdef int number = user.number
        cdef int i
        if user.memmap is not self.memmap or mem.users[number] != &user.user:
            raise ValueError(f"slots: user {number} has ended or is another machine's")
        out.nr_present = out.nr_swapped = 0
        for i in range(NR_SLOT_FAULTS):
            out.first[i] = -1
        with nogil:
            count_slots(mem, number, &out)
        return out.nr_present, out.nr_swapped, tuple([out.first[i] for i in range(NR_SLOT_FAULTS)])

    def lru_entries(self, int nid, int lru):
        """Count the pages that entries of a node's LRU list stand for and that are on it.

        A page that an entry was counted for before counts no more.

        :param lru: 0 inactive anon, 1 active anon, 2 inactive file, 3 active file.
        :return: those; how many the list itself says.
        :raises ValueError: if there is no such list.
        """
        cdef const mem_t *mem = &self.memmap.mem
        cdef int64_t n
        if not 0 <= nid < mem.nr_nodes or not 0 <= lru < NR_LRU_LISTS:
            raise ValueError(f"lru_entries: node {nid}, list {lru}")
        with nogil:
            n = count_entries(mem, nid, lru, &self.seen[0])
        return n, mem.nodes[nid].lru[lru].nr_live

    def pages(self):
        """Walk the records of all pages of online sections.

        :return: the first page (-1 for none) that is no block of its user's order, that its
            user's slots do not hold, that is isolated, that is on no list though its kind is, and
            that is on one though its kind is not; per node and list the first page without
            an entry that lru_entries() counted, or -1; per zone of the table the pages of each
            class: kind, mapped, huge and the marks LRU, ACTIVE, MLOCKED, DIRTY and WRITEBACK, of
            4, 1, 1 and 5 bits from the highest down.
        """
        cdef const mem_t *mem = &self.memmap.mem
        cdef pages_t out
        cdef pfn_t section
        cdef int i
        missing = np.full((mem.nr_nodes, NR_LRU_LISTS), -1, dtype=np.int64)
        classes = np.zeros((mem.nr_zones, NR_CLASSES), dtype=np.int64)
        cdef int64_t[:, ::1] of_lists = missing, of_zones = classes
        for i in range(NR_PAGE_FAULTS):
            out.first[i] = -1
        out.missing, out.classes, out.seen = &of_lists[0, 0], &of_zones[0, 0], &self.seen[0]
        with nogil:
            for section in range(mem.nr_pages >> SECTION_PFN_SHIFT):
                if mem.sections[section].flags & SECTION_IS_ONLINE:
                    count_section(mem, section << SECTION_PFN_SHIFT, &out)
        return tuple([out.first[i] for i in range(NR_PAGE_FAULTS)]), missing, classes


cdef int64_t count_taken(const mem_t *mem, pfn_t start) noexcept nogil:
    """Pages of a pageblock that are in nobody's list: handed out, or taken as broken."""
    cdef uint8_t fill = mem.blocks[start >> PAGEBLOCK_ORDER].state & BLOCK_FILL
    cdef uint8_t state
    cdef int64_t n = 0
    cdef pfn_t pfn
    for pfn in range(start, start + PAGEBLOCK_PAGES):
        state = mem.states[pfn]
        if state & (STATE_BUDDY | STATE_PCP | STATE_ALLOCATED) == STATE_ALLOCATED:
            n += <int64_t> 1 << (state & STATE_ORDER)
        elif not state and fill != FILL_KERNEL and mem.pages[pfn].flags & (PF_TAKEN | PF_SLAB):
            # What the kernel took before the story began, and pages that were taken as broken.
            n += 1
    return n


def taken_pages(MemMap memmap not None, const int64_t[::1] blocks not None):
    """Count the managed pages of pageblocks, by their pages' records, that are on nobody's list.

    :param blocks: numbers of pageblocks whose pages have records.
    """
    cdef const mem_t *mem = &memmap.mem
    cdef int64_t n = 0
    cdef Py_ssize_t i
    cdef pfn_t end = mem.nr_pages >> PAGEBLOCK_ORDER
    with nogil:
        for i in range(blocks.shape[0]):
            if <pfn_t> blocks[i] < end:
                n += count_taken(mem, <pfn_t> blocks[i] << PAGEBLOCK_ORDER)
    return n
