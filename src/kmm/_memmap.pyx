"""Page, pageblock and section records: the memmap that the rest of the engine works on.

Models mm/sparse.c and the memmap part of mm/mm_init.c over buffers that the machine hands
in.  A page that was never touched costs nothing: free blocks of order 9 and 10 live in the
pageblock records (16 bytes for 512 pages), smaller ones in the page records.
"""
import numpy as np

from kmm._vmstat cimport NR_NODE_STATS, NR_VM_EVENTS

from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memset

cdef extern from *:
    """
    #define kmm_write_first(p) (*(volatile uint16_t *)(p) = 0)
    """
    void write_first "kmm_write_first"(uint16_t *p) noexcept nogil

cdef enum:
    FIRST_LRU_ENTRY = (1 << 30) - 600

cdef page_t _page
cdef pageblock_t _block
cdef section_t _section

#: NumPy dtypes of the engine's records, derived from the C structs.
page_dtype = np.asarray(<page_t[:1]> &_page).dtype
pageblock_dtype = np.asarray(<pageblock_t[:1]> &_block).dtype
section_dtype = np.asarray(<section_t[:1]> &_section).dtype


cdef class MemMap:
    """The record arrays of a machine and the tables of its zones, nodes and CPUs."""

    def __cinit__(self, page_t[::1] pages, uint8_t[::1] states, pageblock_t[::1] blocks,
                  section_t[::1] sections,
                  int nr_zones, node_of_cpu=(0,), cpus_per_node=None,
                  uint64_t[::1] tokens=None):
        cdef int i, lru
        self.user_objects = {}
        cpus_per_node = cpus_per_node or {}
        if min(pages.shape[0], states.shape[0], blocks.shape[0], sections.shape[0]) == 0:
            raise ValueError("MemMap: empty buffer")
        if (states.shape[0] != pages.shape[0]
                or blocks.shape[0] != pages.shape[0] >> PAGEBLOCK_ORDER
                or sections.shape[0] != pages.shape[0] >> SECTION_PFN_SHIFT):
            raise ValueError("MemMap: the buffers describe different numbers of pages")
        self.pages_buffer, self.states_buffer = pages, states
        self.blocks_buffer, self.sections_buffer = blocks, sections
        self.mem.pages = &pages[0]
        self.mem.states = &states[0]
        self.mem.blocks = &blocks[0]
        self.mem.sections = &sections[0]
        self.mem.nr_pages = pages.shape[0]
        if tokens is not None:
            if tokens.shape[0] != pages.shape[0]:
                raise ValueError("MemMap: the buffers describe different numbers of pages")
            self.tokens_buffer, self.mem.tokens = tokens, &tokens[0]
        self.mem.nr_zones = nr_zones
        self.mem.nr_nodes = nr_zones / NR_ZONES
        self.mem.nr_cpus = len(node_of_cpu)
        self.mem.zones = <zone_t **> calloc(nr_zones, sizeof(zone_t *))
        self.mem.nodes = <node_t *> calloc(self.mem.nr_nodes, sizeof(node_t))
        self.mem.node_of_cpu = <int32_t *> calloc(self.mem.nr_cpus, sizeof(int32_t))
        # Room for every zone on both lists of every node.
        self.zonerefs = <zone_t **> calloc(2 * self.mem.nr_nodes * nr_zones, sizeof(zone_t *))
        if (self.mem.zones == NULL or self.mem.nodes == NULL or self.mem.node_of_cpu == NULL
                or self.zonerefs == NULL):
            raise MemoryError("MemMap: tables of zones, nodes and CPUs")
        for i in range(self.mem.nr_nodes):
            self.mem.nodes[i].fallback.zones = &self.zonerefs[2 * i * nr_zones]
            self.mem.nodes[i].nofallback.zones = &self.zonerefs[(2 * i + 1) * nr_zones]
            self.mem.nodes[i].kswapd_order = -1
            for lru in range(NR_LRU_LISTS):
                # The tags of entries come round soon, so that every use shows that they may.
                self.mem.nodes[i].lru[lru].head = FIRST_LRU_ENTRY
                self.mem.nodes[i].lru[lru].tail = FIRST_LRU_ENTRY
        for i in range(self.mem.nr_cpus):
            self.mem.node_of_cpu[i] = node_of_cpu[i]
        for i in cpus_per_node:
            self.mem.nodes[i].nr_cpus = cpus_per_node[i]

    def __dealloc__(self):
        cdef int nid, lru
        for nid in range(self.mem.nr_nodes if self.mem.nodes != NULL else 0):
            for lru in range(NR_LRU_LISTS):
                free(self.mem.nodes[nid].lru[lru].ring)
        free(self.mem.users)
        free(self.mem.zones)
        free(self.mem.nodes)
        free(self.mem.node_of_cpu)
        free(self.zonerefs)
        free(self.journal.entries)

    cdef void set_zone(self, int index, zone_t *zone) noexcept:
        self.mem.zones[index] = zone

    def begin_journal(self):
        """Keep the old contents of every record that the allocator writes from now on."""
        if self.mem.journal != NULL:
            raise ValueError("begin_journal: already begun")
        self.journal.count = 0
        self.journal.lost = 0
        self.mem.journal = &self.journal

    def end_journal(self, bint restore):
        """Stop keeping them; with restore, put them all back, the last written first."""
        cdef uint64_t i
        cdef journal_entry_t *entry
        self.mem.journal = NULL
        if restore and self.journal.lost:
            raise MemoryError("end_journal: old records could not be kept")
        if restore:
            for i in range(self.journal.count):
                entry = &self.journal.entries[self.journal.count - 1 - i]
                memcpy(entry.where, entry.old, entry.size)
        free(self.journal.entries)
        memset(&self.journal, 0, sizeof(journal_t))

    def set_zonelists(self, int nid, fallback, nofallback):
        """Set in which order a node's requests ask zones (build_zonelists).

        :param fallback: indices of zones in the zone table; nofallback: those of the node alone.
        """
        self.fill_zonelist(&self.mem.nodes[nid].fallback, fallback)
        self.fill_zonelist(&self.mem.nodes[nid].nofallback, nofallback)

    cdef void fill_zonelist(self, zonelist_t *zonelist, indices):
        cdef int i, highest
        zonelist.nr = len(indices)
        for highest in range(NR_ZONES):
            zonelist.first[highest] = zonelist.nr
        for i in reversed(range(zonelist.nr)):
            zonelist.zones[i] = self.mem.zones[<int> indices[i]]
            for highest in range(zonelist.zones[i].zone_idx, NR_ZONES):
                zonelist.first[highest] = i

    def wakeup_kswapd(self, int zone_index, int order, int highest_zoneidx):
        """Leave word for the kswapd of a zone's node."""
        wakeup_kswapd(&self.mem, self.mem.zones[zone_index], order, highest_zoneidx)

    def kswapd_state(self, int nid):
        """(times woken, highest order or -1, highest zone index) of what a node's kswapd heard."""
        cdef node_t *node = &self.mem.nodes[nid]
        return node.kswapd_wakeups, node.kswapd_order, node.kswapd_highest_zoneidx

    def node_stat(self, int nid):
        """What mechanisms have moved each item of a node by, in the order of NODE_STAT_ITEMS."""
        return [self.mem.nodes[nid].stat[i] for i in range(NR_NODE_STATS)]

    def lru_entries(self, int nid, int lru):
        """What a node's LRU list holds, the oldest first, entries included that count no more.

        :param lru: 0 inactive anon, 1 active anon, 2 inactive file, 3 active file.
        :return: a uint64 array, a pfn in the low 34 bits and a tag above; how many count.
        """
        cdef const lru_list_t *lst
        cdef uint64_t[::1] out
        cdef uint64_t at
        if not 0 <= nid < self.mem.nr_nodes or not 0 <= lru < NR_LRU_LISTS:
            raise ValueError(f"lru_entries: node {nid}, list {lru}")
        lst = &self.mem.nodes[nid].lru[lru]
        entries = np.zeros(lst.head - lst.tail, dtype=np.uint64)
        out = entries
        for at in range(lst.tail, lst.head):
            out[at - lst.tail] = lst.ring[at & (lst.room - 1)]
        return entries, lst.nr_live

    def user_numbers(self):
        """Numbers of the users that there are, in ascending order."""
        return [i for i in range(1, self.mem.nr_users) if self.mem.users[i] != NULL]

    def page_users(self):
        """The PageUser of each number, also of those that a mechanism keeps for itself."""
        return dict(self.user_objects)

    def vm_events(self):
        """How often the engine has seen each event, in the order of VM_EVENT_ITEMS."""
        return [self.mem.events[i] for i in range(NR_VM_EVENTS)]

    @property
    def nr_online_nodes(self):
        """The kernel's nr_online_nodes."""
        return self.mem.nr_online_nodes

    @nr_online_nodes.setter
    def nr_online_nodes(self, int value):
        self.mem.nr_online_nodes = value

    @property
    def journaling(self):
        """Whether old contents are being kept."""
        return self.mem.journal != NULL

    @property
    def nr_pages(self):
        """Pages that the records can describe."""
        return self.mem.nr_pages

    @property
    def grouping_disabled(self):
        """The kernel's page_group_by_mobility_disabled."""
        return bool(self.mem.grouping_disabled)

    @grouping_disabled.setter
    def grouping_disabled(self, bint value):
        self.mem.grouping_disabled = value

    def get_pageblock_migratetype(self, pfn_t pfn):
        """Return the migratetype (0..4) of the pageblock that holds pfn."""
        return get_pageblock_migratetype(&self.mem, pfn)

    def set_pageblock_migratetype(self, pfn_t pfn, int mt):
        """Set the migratetype (0..4) of the pageblock that holds pfn."""
        set_pageblock_migratetype(&self.mem, pfn, mt)

    def memmap_init_range(self, pfn_t start, pfn_t nr, int zone_index, int mt, int fill):
        """Forget what the pages were: put them into a zone, their pageblocks to mt.

        :param start: first pfn, a multiple of 512.
        :param nr: pages, a multiple of 512.
        :param zone_index: index into the zone table, or -1 for no zone.
        :param mt: migratetype of the pageblocks.
        :param fill: a FILL_* value, what the pages are until they have records of their own.
        :return: whether page records of the range had been written (they are zero now).
        """
        cdef bint dirty
        with nogil:
            dirty = memmap_init_range(&self.mem, start, nr, zone_index, mt, fill)
        return dirty

    def set_page_flags(self, pfn_t pfn, uint16_t flags):
        """Write one page's marks (boot and failing memory).

        :raises ValueError: where there is no page, and if a user's page would lose what its user
            and its list say of it.
        """
        cdef uint16_t own = <uint16_t> ~(PF_HWPOISON | PF_PINNED | PF_REFERENCED)
        if pfn >= self.mem.nr_pages:
            raise ValueError(f"set_page_flags: pfn {pfn:#x}")
        if (self.mem.pages[pfn].flags | flags) & PF_USER and (
                self.mem.pages[pfn].flags ^ flags) & own:
            raise ValueError(f"set_page_flags: pfn {pfn:#x}, {flags:#x} instead of "
                             f"{self.mem.pages[pfn].flags:#x}, which its user needs")
        self.mem.blocks[pfn >> PAGEBLOCK_ORDER].state |= BLOCK_DIRTY
        self.mem.pages[pfn].flags = flags
        # Whoever frees the page has to see that there is more to do.
        if self.mem.states[pfn] & ~(STATE_MARKED | STATE_ORDER) == STATE_ALLOCATED:
            self.mem.states[pfn] |= STATE_MARKED
        # A single page is swallowed when it is freed; a larger block is, when it is next taken.
        if flags & PF_HWPOISON and self.mem.states[pfn] & ~STATE_MARKED != STATE_ALLOCATED:
            self.mem.poisoned = 1

    def shrink_search(self, pfn_t start, pfn_t end, int zone_index, bint upward):
        """Find where a zone's span ends after a range left it.

        Looks in steps of 512 pages for an online page of the zone: the first one at or above
        start when upward, else the last one below end (end included as pfn end).

        :return: the pfn, or -1 if there is none (find_smallest/biggest_section_pfn).
        """
        cdef int64_t found
        with nogil:
            found = shrink_search(&self.mem, start, end, zone_index, upward)
        return found

    def is_allocated(self, pfn_t pfn, int order):
        """Whether a block of 2^order pages at pfn was handed out by the allocator."""
        cdef const pageblock_t *block
        if pfn >= self.mem.nr_pages:
            return False
        block = &self.mem.blocks[pfn >> PAGEBLOCK_ORDER]
        if order >= PAGEBLOCK_ORDER:
            return (pfn & (PAGEBLOCK_PAGES - 1)) == 0 and block.kind == KIND_ALLOCATED and block.order == order
        return self.mem.states[pfn] & ~STATE_MARKED == STATE_ALLOCATED | order

    def sections_are(self, pfn_t start, pfn_t nr, int mask, int want):
        """Whether all sections of a range of pages are whole and have these flags under a mask."""
        cdef pfn_t s
        for s in range(start >> SECTION_PFN_SHIFT,
                       (start + nr + SECTION_PAGES - 1) >> SECTION_PFN_SHIFT):
            if (self.mem.sections[s].subsection_map != <uint64_t> -1
                    or self.mem.sections[s].flags & mask != want):
                return False
        return True

    def dirty_blocks(self, pfn_t start, pfn_t nr):
        """Count pageblocks of a range whose page records were written."""
        cdef pfn_t b, n = 0
        for b in range(start >> PAGEBLOCK_ORDER, (start + nr) >> PAGEBLOCK_ORDER):
            n += (self.mem.blocks[b].state & BLOCK_DIRTY) != 0
        return n


cdef void journal_add(journal_t *journal, void *where, uint64_t size) noexcept nogil:
    cdef journal_entry_t *grown
    if journal.count == journal.room:
        grown = <journal_entry_t *> realloc(
            journal.entries, (2 * journal.room + 64) * sizeof(journal_entry_t))
        if grown == NULL:
            journal.lost = 1
            return
        journal.entries = grown
        journal.room = 2 * journal.room + 64
    journal.entries[journal.count].where = where
    journal.entries[journal.count].size = size
    memcpy(journal.entries[journal.count].old, where, size)
    journal.count += 1


cdef bint memmap_init_range(mem_t *mem, pfn_t start, pfn_t nr, int zone_index, int mt,
                            int fill) noexcept nogil:
    cdef pfn_t b, first = start >> PAGEBLOCK_ORDER, last = (start + nr) >> PAGEBLOCK_ORDER
    cdef bint dirty = False
    for b in range(first, last):
        if (b & 255) == 0 or b == first:
            # A host page that is read before it is written costs two faults.
            write_first(&mem.blocks[b].flags)
        if mem.blocks[b].state & BLOCK_DIRTY:
            dirty = True
            memset(&mem.pages[b << PAGEBLOCK_ORDER], 0, PAGEBLOCK_PAGES * sizeof(page_t))
            memset(&mem.states[b << PAGEBLOCK_ORDER], 0, PAGEBLOCK_PAGES)
    memset(&mem.blocks[first], 0, (last - first) * sizeof(pageblock_t))
    for b in range(first, last):
        mem.blocks[b].zone = zone_index + 1
        mem.blocks[b].state = fill
    b = first
    while b < last:
        if (b & 63) == 0 and b + 64 <= last and mem.journal == NULL:
            set_section_migratetype(mem, b >> 6, mt)
            b += 64
        else:
            set_pageblock_migratetype(mem, b << PAGEBLOCK_ORDER, mt)
            b += 1
    return dirty


cdef void set_section_migratetype(mem_t *mem, pfn_t section, int mt) noexcept nogil:
    cdef int i
    if mem.grouping_disabled and mt < MIGRATE_HIGHATOMIC:
        mt = MIGRATE_UNMOVABLE
    for i in range(4):
        mem.sections[section].pageblock_flags[i] = mt * <uint64_t> 0x1111111111111111


cdef int64_t shrink_search(const mem_t *mem, pfn_t start, pfn_t end, int zone_index,
                           bint upward) noexcept nogil:
    # Sections are either wholly offline or looked at pageblock by pageblock: a terabyte of
    # offline sections costs one test each.
    cdef pfn_t pfn
    if upward:
        pfn = start
        while pfn < end:
            if not section_online(mem, pfn):
                pfn = (pfn | (SECTION_PAGES - 1)) + 1
                continue
            if mem.blocks[pfn >> PAGEBLOCK_ORDER].zone == zone_index + 1:
                return pfn
            pfn += PAGEBLOCK_PAGES
        return -1
    pfn = end
    while pfn >= start:
        if section_online(mem, pfn):
            if mem.blocks[pfn >> PAGEBLOCK_ORDER].zone == zone_index + 1:
                return pfn
            if pfn < PAGEBLOCK_PAGES:
                break
            pfn -= PAGEBLOCK_PAGES
        else:
            if (pfn >> SECTION_PFN_SHIFT) == 0:
                break
            # Stay on the kernel's 512-page grid, which ends at `end`.
            pfn = pfn - (((pfn & (SECTION_PAGES - 1)) >> PAGEBLOCK_ORDER) + 1) * PAGEBLOCK_PAGES
    return -1
