"""Pages of users: faulted in, let go, read and written (mm/memory.c, mm/filemap.c).

A user maps an index to a page in one array.  Pages may carry a token, which stays with the page
as its content would, so that a test can tell whether a page was lost, doubled or swapped.
"""
import numpy as np

from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from kmm._allocator cimport PageAllocator
from kmm._free_pages cimport free_pages, free_pages_bulk
from kmm._freelist cimport prefetch, set_state, touch_block
from kmm._page_alloc cimport alloc_pages, alloc_pages_bulk
from kmm._swapfile cimport swap_free

from kmm.errors import kernel_error

cdef enum:
    ENOMEM = 12
    CHUNK = 512                     # pages faulted in or let go before others are looked after
    AHEAD = 16                      # records fetched ahead
    MAX_FOLIO_ORDER = 18            # of a gigantic huge page
    INDEX_BITS = 34                 # of a page at its user, in the page's record
    PAGEVEC_SIZE = 15               # pages of a file that go at once
    MAX_GATHER_BATCH = 510          # and of an address space


cdef int64_t MAX_SLOTS = <int64_t> 1 << INDEX_BITS


# -- one page -----------------------------------------------------------------------------------

cdef inline uint16_t kind_flags(int kind) noexcept nogil:
    """The marks that all pages of a kind bear, beside those of LRU lists."""
    if kind == USER_SLAB_RECLAIMABLE or kind == USER_SLAB_UNRECLAIMABLE:
        return PF_USER | PF_SLAB
    if kind == USER_MOVABLE_OPS:
        return PF_USER | PF_MOVABLE_OPS
    if kind == USER_OFFLINE:
        return PF_USER | PF_OFFLINE
    return PF_USER


cdef void sow_tokens(mem_t *mem, user_t *user, uint64_t index, pfn_t pfn,
                     int64_t pages) noexcept nogil:
    cdef int64_t i, slots = pages >> user.order
    cdef uint64_t first = index << user.order
    for i in range(pages):
        mem.tokens[pfn + i] = token_of(user.seed, first + i)
    memset(&user.written[index], 1, slots)


cdef inline void fill_tokens(mem_t *mem, user_t *user, uint64_t index, pfn_t pfn,
                             int64_t pages, uint16_t flags) noexcept nogil:
    """Let fresh pages hold what was written, what the backing store has for them, or zeros."""
    if user.seed and (user.kind != USER_FILE or flags & PF_DIRTY):
        sow_tokens(mem, user, index, pfn, pages)
    elif user.store != NULL and user.order == 0:
        memcpy(&mem.tokens[pfn], &user.store[index], pages * sizeof(uint64_t))
    else:
        memset(&mem.tokens[pfn], 0, pages * sizeof(uint64_t))


cdef void attach_page(mem_t *mem, int number, uint64_t index, pfn_t pfn, bint huge,
                      uint16_t flags) noexcept nogil:
    cdef user_t *user = mem.users[number]
    cdef zone_t *zone = page_zone(mem, pfn)
    cdef pageblock_t *block
    cdef page_t *page
    cdef uint16_t *where
    cdef int64_t i
    cdef uint64_t slot = SLOT_PRESENT | pfn
    cdef int64_t pages = PAGEBLOCK_PAGES if huge and user.order == 0 else <int64_t> 1 << user.order
    if user.kind == USER_ANON or user.mapped:
        slot |= SLOT_YOUNG
    if user.kind == USER_FILE and flags & PF_DIRTY:
        node_stat_add(mem, zone, NR_DIRTIED, pages)
    if user.locked:
        flags |= PF_MLOCKED
    flags |= kind_flags(user.kind)
    if huge:
        block = block_of(mem, pfn)
        block.next = block.prev = 0
        set_block_user(mem, block, number, index)
        where = &block.flags
    else:
        page = &mem.pages[pfn]
        set_page_user(page, number, index)
        mem.states[pfn] |= STATE_MARKED
        where = &page.flags
    where[0] = flags
    if huge and user.order == 0:
        for i in range(PAGEBLOCK_PAGES):
            user.slots[index + i] = (slot + i) | SLOT_HUGE
        user.nr_present += PAGEBLOCK_PAGES
        user.nr_came += PAGEBLOCK_PAGES
        account_use(mem, zone, user, True, flags, pages)
    else:
        user.slots[index] = slot
        user.nr_present += 1
        user.nr_came += 1
        account_use(mem, zone, user, False, flags, pages)
    if user.tokens:
        fill_tokens(mem, user, index, pfn, pages, flags)
    if on_lru_kind(user.kind):
        lru_add(mem, zone, pfn, user.kind, huge, where)


cdef void detach_page(mem_t *mem, const folio_t *folio) noexcept nogil:
    cdef user_t *user = mem.users[folio.user]
    cdef zone_t *zone = page_zone(mem, folio.pfn)
    cdef int64_t units = PAGEBLOCK_PAGES if folio.huge and user.order == 0 else 1
    if folio.flags[0] & PF_LRU:
        lru_del(mem, zone, user.kind, folio.huge, folio.flags)
    if folio.flags[0] & PF_ISOLATED:
        # Whoever meant to move it finds it gone.
        count_isolated(mem, folio, -(units << user.order))
    account_use(mem, zone, user, folio.huge, folio.flags[0], -(units << user.order))
    user.nr_present -= units
    # A broken page and one that is held for long keep their marks.
    folio.flags[0] &= PF_HWPOISON | PF_PINNED
    if not folio.huge and not folio.flags[0]:
        mem.states[folio.pfn] &= <uint8_t> ~STATE_MARKED


cdef void split_huge_page(mem_t *mem, const folio_t *folio) noexcept nogil:
    cdef user_t *user = mem.users[folio.user]
    cdef zone_t *zone = page_zone(mem, folio.pfn)
    cdef uint16_t flags = folio.flags[0], broken
    cdef pfn_t pfn
    cdef int64_t i
    cdef pageblock_t *block = block_of(mem, folio.pfn)
    if flags & PF_LRU:
        lru_del(mem, zone, user.kind, True, folio.flags)
    account_use(mem, zone, user, True, flags, -PAGEBLOCK_PAGES)
    account_use(mem, zone, user, False, flags, PAGEBLOCK_PAGES)
    if user.kind == USER_ANON:
        # Unmapped and mapped again, so that they know themselves what the page table knew.
        flags |= PF_DIRTY
    block.kind = KIND_NONE
    block.order = block.mt = 0
    block.next = block.prev = 0
    block.flags = 0
    block.state |= BLOCK_DIRTY
    for i in range(PAGEBLOCK_PAGES):
        pfn = folio.pfn + i
        broken = mem.pages[pfn].flags & PF_HWPOISON
        memset(&mem.pages[pfn], 0, sizeof(page_t))
        set_page_user(&mem.pages[pfn], folio.user, folio.index + i)
        mem.states[pfn] = STATE_ALLOCATED | STATE_MARKED
        mem.pages[pfn].flags = (flags & ~PF_LRU) | broken
        user.slots[folio.index + i] &= ~SLOT_HUGE
        if flags & PF_LRU:
            lru_add(mem, zone, pfn, user.kind, False, &mem.pages[pfn].flags)
    mem.events[THP_SPLIT_PAGE] += 1


cdef void stop_isolation(mem_t *mem, const folio_t *folio) noexcept nogil:
    """Put a page back that somebody meant to move, who then finds that there is nothing to do."""
    if folio.flags[0] & PF_ISOLATED:
        folio.flags[0] &= ~PF_ISOLATED
        count_isolated(mem, folio, -folio_nr_pages(mem, folio))
        lru_add(mem, page_zone(mem, folio.pfn), folio.pfn, mem.users[folio.user].kind, folio.huge,
                folio.flags)


def page_owner(MemMap memmap, pfn_t pfn):
    """(number of the user, index there) of a page, whichever of its block's; (0, 0) for none."""
    cdef mem_t *mem = &memmap.mem
    cdef pfn_t head
    cdef int order
    cdef folio_t folio
    if pfn >= mem.nr_pages:
        return 0, 0
    for order in range(MAX_FOLIO_ORDER + 1):
        head = pfn & ~((<pfn_t> 1 << order) - 1)
        if not read_folio(mem, head, &folio):
            continue
        if (block_of(mem, head).order if folio.huge else mem.states[head] & STATE_ORDER) >= order:
            return folio.user, folio.index + (pfn - head if mem.users[folio.user].order == 0 else 0)
    return 0, 0


# -- the table of users -------------------------------------------------------------------------

cdef int number_for(mem_t *mem, user_t *user) except -1:
    """Put a user into the machine's table."""
    cdef int i
    if mem.users == NULL:
        mem.users = <user_t **> calloc(MAX_USERS, sizeof(user_t *))
        if mem.users == NULL:
            raise MemoryError("PageUser: table of users")
        mem.nr_users = MAX_USERS
    for i in range(1, MAX_USERS):
        if mem.users[i] == NULL:
            mem.users[i] = user
            return i
    raise MemoryError(f"PageUser: {MAX_USERS - 1} users are as many as there can be")


cdef read_only(array):
    """A view to hand out of an array that the engine trusts; it keeps the array itself alive."""
    view = array.view()
    view.flags.writeable = False
    return view


cdef class PageUser:
    """Who uses pages: an address space, a file, or a cache of the kernel.

    :param kind: a USER_* of params.
    :param nr_slots: how many pages, or blocks of the order, it can have.
    :param order: of each block; 0 for all whose pages can be on an LRU list.
    :param tokens: whether its pages carry tokens.
    """

    def __cinit__(self, MemMap memmap, int kind, int64_t nr_slots, int order=0, bint tokens=False):
        if (not 0 <= nr_slots <= MAX_SLOTS or not 0 <= order < 32
                or not 0 < kind <= USER_HUGETLB
                or order and (on_lru_kind(kind) or kind == USER_MOVABLE_OPS)):
            raise ValueError(f"PageUser: kind {kind}, nr_slots {nr_slots}, order {order}")
        memset(&self.user, 0, sizeof(user_t))
        self.memmap = memmap
        self.user.kind, self.user.order, self.user.tokens = kind, order, tokens
        self.resize(nr_slots)
        self.number = number_for(&memmap.mem, &self.user)
        # Its pages point to it, so it stays until close().
        memmap.user_objects[self.number] = self

    def close(self):
        """Be no user any more; nothing of it may be there."""
        if self.user.nr_present or self.user.nr_swapped:
            raise ValueError(f"close: {self.user.nr_present} pages, {self.user.nr_swapped} swapped")
        if self.number:
            self.memmap.mem.users[self.number] = NULL
            del self.memmap.user_objects[self.number]
            self.number = 0

    def resize(self, int64_t nr_slots):
        """Make room for so many pages; what is above has to be gone already."""
        cdef uint64_t[::1] view
        old = self.slots
        if not 0 <= nr_slots <= MAX_SLOTS:
            raise ValueError(f"resize: {nr_slots} slots; allowed: 0 to {MAX_SLOTS}")
        store = None
        if self.user.tokens and self.user.kind == USER_FILE:
            store = np.zeros(max(nr_slots, 1), dtype=np.uint64)
        fresh = np.zeros(max(nr_slots, 1), dtype=np.uint64)
        if old is not None:
            keep = min(len(old), nr_slots)
            if old[keep:].any():
                raise ValueError(f"resize: pages above {nr_slots} are there")
            fresh[:keep] = old[:keep]
        view = fresh
        self.slots, self.user.slots, self.user.nr_slots = read_only(fresh), &view[0], nr_slots
        if store is not None:
            if self.store is not None:
                keep = min(len(self.store), nr_slots)
                store[:keep] = self.store[:keep]
            view = store
            self.store, self.user.store = read_only(store), &view[0]
        if self.written is not None:
            self._note_written(self.written)

    cdef int _note_written(self, old) except -1:
        cdef uint8_t[::1] view
        cdef int64_t nr_slots = <int64_t> self.user.nr_slots, keep = len(old)
        fresh = np.zeros(max(nr_slots, 1), dtype=np.uint8)
        keep = min(keep, nr_slots)
        fresh[:keep] = old[:keep]
        view = fresh
        self.written, self.user.written = read_only(fresh), &view[0]
        return 0

    def sow(self, uint64_t seed):
        """Let each page hold, once it is written, a token that follows from a seed and its index.

        What is anonymous or the kernel's is written as it comes, a file's page when it comes dirty.

        :param seed: not 0.
        """
        if not self.user.tokens or not seed or self.slots.any():
            raise ValueError(f"sow: seed {seed}, of a user with tokens that has nothing yet")
        self._note_written(np.zeros(0, dtype=np.uint8))
        self.user.seed = seed

    @property
    def kind(self):
        """A USER_* of params."""
        return self.user.kind

    @property
    def order(self):
        """The order of its blocks."""
        return self.user.order

    @property
    def tokens(self):
        """Whether its pages carry tokens."""
        return bool(self.user.tokens)

    @property
    def nr_slots(self):
        """How many pages it can have."""
        return self.user.nr_slots

    @property
    def nr_present(self):
        """Slots with a page."""
        return self.user.nr_present

    @property
    def nr_came(self):
        """How often a slot got a page: new ones, and those that came back."""
        return self.user.nr_came

    @property
    def nr_swapped(self):
        """Slots whose content is on the swap device."""
        return self.user.nr_swapped

    @property
    def nr_dirty(self):
        """Pages of a file that its backing store does not have."""
        return self.user.nr_dirty

    @property
    def mapped(self):
        """Whether a file's pages are mapped; settled before the first one comes."""
        return bool(self.user.mapped)

    @mapped.setter
    def mapped(self, bint value):
        if bool(self.user.mapped) != bool(value) and self.user.nr_present:
            # Each of them is counted as what it was when it came.
            raise kernel_error(-22, f"mapped: {bool(value)}; allowed: {bool(self.user.mapped)} "
                                    f"while {self.user.nr_present} pages are there")
        self.user.mapped = value

    @property
    def locked(self):
        """Whether pages are mlocked as they come."""
        return bool(self.user.locked)

    @locked.setter
    def locked(self, bint value):
        self.user.locked = value

    def fault_in(self, PageAllocator m, int64_t start, int64_t n, uint32_t gfp, int nid,
                 uint64_t nodes, int cpu, int flags=0):
        """Give absent slots pages, upward, until a request cannot be served at once.

        Runs without the GIL.

        :param start: first slot; n: how many; of those that have a page nothing changes.
        :param gfp: as for alloc_pages; nid: whose zonelist; nodes: bit k lets node k give.
        :param flags: marks that the pages bear (PG_DIRTY, PG_REFERENCED, ...).
        :return: slots passed: n, or fewer if there was no memory for the next, its content is on
            the swap device, or a kswapd was woken, who should do its work now.
        """
        cdef mem_t *mem = self._mem(m)
        cdef int64_t done
        self._check(start, n)
        with nogil:
            done = fault_in(mem, self.number, start, n, gfp, nid, nodes, cpu, <uint16_t> flags)
        if done < 0:
            raise MemoryError("fault_in: LRU lists")
        return done

    def fault_in_huge(self, PageAllocator m, int64_t start, uint32_t gfp, int nid, uint64_t nodes,
                      int cpu, int flags=0):
        """Give 512 absent slots, from a multiple of 512 on, a block of order 9; whether it did."""
        cdef mem_t *mem = self._mem(m)
        cdef int64_t pfn
        self._check(start, PAGEBLOCK_PAGES)
        if start % PAGEBLOCK_PAGES or self.user.order:
            raise ValueError(f"fault_in_huge: slot {start}")
        if self.slots[start:start + PAGEBLOCK_PAGES].any():
            return False
        if lru_make_room(mem, nodes_of(mem), 1):
            raise MemoryError("fault_in_huge: LRU lists")
        pfn = alloc_pages(mem, gfp, PAGEBLOCK_ORDER, nid, nodes, cpu)
        if pfn < 0:
            return False
        attach_page(mem, self.number, start, <pfn_t> pfn, True, <uint16_t> flags)
        return True

    def attach(self, PageAllocator m, int64_t index, pfn_t pfn, int flags=0):
        """Make a block that was handed out, of the user's order, the page of an absent slot."""
        cdef mem_t *mem = self._mem(m)
        cdef folio_t folio
        self._check(index, 1)
        if (self.user.slots[index] or not m.memmap_engine_.is_allocated(pfn, self.user.order)
                or read_folio(mem, pfn, &folio)):
            raise ValueError(f"attach: slot {index}, pfn {pfn:#x}")
        if lru_make_room(mem, nodes_of(mem), 1):
            raise MemoryError("attach: LRU lists")
        attach_page(mem, self.number, index, pfn, self.user.order >= PAGEBLOCK_ORDER,
                    <uint16_t> flags)

    def attach_huge(self, PageAllocator m, int64_t start, pfn_t pfn, int flags=0):
        """Make a block of order 9 that was handed out the pages of 512 absent slots."""
        cdef mem_t *mem = self._mem(m)
        cdef folio_t folio
        self._check(start, PAGEBLOCK_PAGES)
        if (start % PAGEBLOCK_PAGES or self.user.order
                or self.slots[start:start + PAGEBLOCK_PAGES].any()
                or not m.memmap_engine_.is_allocated(pfn, PAGEBLOCK_ORDER)
                or read_folio(mem, pfn, &folio)):
            raise ValueError(f"attach_huge: slot {start}, pfn {pfn:#x}")
        if lru_make_room(mem, nodes_of(mem), 1):
            raise MemoryError("attach_huge: LRU lists")
        attach_page(mem, self.number, start, pfn, True, <uint16_t> flags)

    def detach(self, PageAllocator m, int64_t index):
        """Take a slot's page from the user, which is then the caller's; its pfn."""
        cdef mem_t *mem = self._mem(m)
        cdef folio_t folio
        self._check(index, 1)
        if not self.user.slots[index] & SLOT_PRESENT or self.user.slots[index] & SLOT_HUGE:
            raise ValueError(f"detach: slot {index} has no single page")
        read_folio(mem, self.user.slots[index] & SLOT_PFN, &folio)
        detach_page(mem, &folio)
        self.user.slots[index] = 0
        forget_written(&self.user, index, 1)
        return folio.pfn

    def split(self, PageAllocator m, int64_t index):
        """Split the block of order 9 that a slot is part of, if it is part of one; whether so."""
        cdef mem_t *mem = self._mem(m)
        cdef folio_t folio
        self._check(index, 1)
        if not self.user.slots[index] & SLOT_HUGE:
            return False
        if lru_make_room(mem, nodes_of(mem), PAGEBLOCK_PAGES + 1):
            raise MemoryError("split: LRU lists")
        read_folio(mem, (self.user.slots[index] & SLOT_PFN) & ~<pfn_t> (PAGEBLOCK_PAGES - 1),
                   &folio)
        stop_isolation(mem, &folio)
        split_huge_page(mem, &folio)
        return True

    def let_go(self, PageAllocator m, int64_t start, int64_t n, int cpu):
        """Free the pages of a range of slots, and forget what is on the swap device.

        Upward, but what is on LRU lists goes in batches as the kernel gathers it, of which each is
        freed from its end.

        A block of order 9 that the range holds only part of is split first.  A page that is
        pinned stays with whoever pinned it, without a user.  A file is cut: its backing store
        forgets the range too.

        :return: pages freed.
        """
        cdef mem_t *mem = self._mem(m)
        cdef int64_t freed
        self._check(start, n)
        if lru_make_room(mem, nodes_of(mem), 2 * (PAGEBLOCK_PAGES + 1)):
            raise MemoryError("let_go: LRU lists")
        with nogil:
            freed = let_go(mem, self.number, start, start + n, cpu)
            forget_written(&self.user, start, n)
        if self.user.store != NULL:
            memset(&self.user.store[start], 0, n * sizeof(uint64_t))
        return freed

    def pfns(self, int64_t start, int64_t n):
        """Return where the pages of a range of slots are: an int64 array, -1 for none."""
        self._check(start, n)
        slots = self.slots[start:start + n]
        there = (slots & np.uint64(SLOT_PRESENT)) != 0
        return np.where(there, (slots & np.uint64(SLOT_PFN)).astype(np.int64), -1)

    def write_tokens(self, int64_t start, const uint64_t[::1] tokens):
        """Write what present pages hold; all slots of the range have to have a page.

        A file's pages are dirty then.
        """
        cdef mem_t *mem = &self.memmap.mem
        cdef int64_t i, missing = -1
        cdef folio_t folio
        cdef pfn_t pfn
        self._check(start, tokens.shape[0])
        if not self.user.tokens:
            raise ValueError("write_tokens: pages of this user carry none")
        if self.user.seed:
            raise ValueError("write_tokens: what these pages hold follows from a seed")
        with nogil:
            for i in range(tokens.shape[0]):
                if not self.user.slots[start + i] & SLOT_PRESENT:
                    missing = start + i
                    break
                mem.tokens[self.user.slots[start + i] & SLOT_PFN] = tokens[i]
                if self.user.kind == USER_FILE:
                    pfn = self.user.slots[start + i] & SLOT_PFN
                    if self.user.slots[start + i] & SLOT_HUGE:
                        pfn &= ~<pfn_t> (PAGEBLOCK_PAGES - 1)
                    read_folio(mem, pfn, &folio)
                    set_page_dirty(mem, &folio)
        if missing >= 0:
            raise ValueError(f"write_tokens: slot {missing} has no page")

    def read_tokens(self, int64_t start, int64_t n):
        """Return what each slot holds, in memory, on the swap device or the backing store."""
        cdef mem_t *mem = &self.memmap.mem
        cdef uint64_t[::1] out
        cdef uint64_t slot
        cdef int64_t i
        self._check(start, n)
        if not self.user.tokens:
            raise ValueError("read_tokens: pages of this user carry none")
        tokens = np.zeros(n, dtype=np.uint64)
        out = tokens
        with nogil:
            for i in range(n):
                slot = self.user.slots[start + i]
                if slot & SLOT_PRESENT:
                    out[i] = mem.tokens[slot & SLOT_PFN]
                elif slot & SLOT_SWAPPED:
                    out[i] = mem.swap.tokens[slot & SLOT_PFN]
                elif self.user.store != NULL:
                    out[i] = self.user.store[start + i]
        return tokens

    cdef mem_t *_mem(self, PageAllocator m) except NULL:
        if m.memmap_engine_ is not self.memmap:
            raise ValueError("PageUser: of another machine")
        if not self.number:
            raise ValueError("PageUser: it is closed")
        if m.mem.journal != NULL:
            raise ValueError("PageUser: pages of users do not change inside a chain of records")
        return m.mem

    cdef int _check(self, int64_t start, int64_t n) except -1:
        if start < 0 or n < 0 or n > <int64_t> self.user.nr_slots - start:
            raise ValueError(f"slots {start}+{n}; allowed: 0 to {self.user.nr_slots}")
        return 0


# -- many pages ---------------------------------------------------------------------------------

cdef uint64_t nodes_of(const mem_t *mem) noexcept nogil:
    return (<uint64_t> 1 << mem.nr_nodes) - 1 if mem.nr_nodes < 64 else ~<uint64_t> 0


cdef bint kswapd_pending(const mem_t *mem) noexcept nogil:
    cdef int nid
    for nid in range(mem.nr_nodes):
        if mem.nodes[nid].kswapd_pending:
            return True
    return False


cdef int64_t fault_in(mem_t *mem, int number, int64_t start, int64_t n, uint32_t gfp, int nid,
                      uint64_t nodes, int cpu, uint16_t flags) noexcept nogil:
    cdef user_t *user = mem.users[number]
    cdef int64_t at = start, end = start + n, run, got, i
    cdef uint64_t pfns[CHUNK]
    while at < end:
        if user.slots[at]:
            if not user.slots[at] & SLOT_PRESENT:
                break
            at += 1
            continue
        run = 1
        while run < CHUNK and at + run < end and not user.slots[at + run]:
            run += 1
        if lru_make_room(mem, nodes_of(mem), run):
            return -ENOMEM
        if user.order == 0:
            got = alloc_pages_bulk(mem, gfp, 0, nid, nodes, cpu, pfns, run)
        else:
            got = alloc_pages_bulk(mem, gfp, user.order, nid, nodes, cpu, pfns, run)
        for i in range(got):
            if i + AHEAD < got:
                prefetch(&mem.pages[pfns[i + AHEAD]])
            attach_page(mem, number, at + i, pfns[i], user.order >= PAGEBLOCK_ORDER, flags)
        at += got
        if got < run or kswapd_pending(mem):
            break
    return at - start


cdef inline int64_t pages_together(int kind) noexcept nogil:
    """How many pages are collected, and then freed from the last one back (release_pages)."""
    if kind == USER_ANON:
        return MAX_GATHER_BATCH
    return PAGEVEC_SIZE if kind == USER_SHMEM or kind == USER_FILE else 1


cdef void release_pages(mem_t *mem, const user_t *user, uint64_t *pfns, int64_t n,
                        int cpu) noexcept nogil:
    """Free collected pages in the order in which the kernel does, groups of them at once."""
    cdef int64_t group = pages_together(user.kind), first = 0, i, j, failed
    while first < n and group > 1:
        i, j = first, min(first + group, n) - 1
        while i < j:
            pfns[i], pfns[j] = pfns[j], pfns[i]
            i += 1
            j -= 1
        first += group
    free_pages_bulk(mem, pfns, n, user.order, cpu, &failed)


cdef int64_t let_go(mem_t *mem, int number, int64_t start, int64_t end, int cpu) noexcept nogil:
    cdef user_t *user = mem.users[number]
    cdef int64_t at = start, freed = 0, n = 0, most = MAX_GATHER_BATCH
    cdef uint64_t slot
    cdef uint64_t pfns[CHUNK]
    cdef folio_t folio
    while at < end:
        slot = user.slots[at]
        if slot & SLOT_SWAPPED:
            swap_free(mem, slot & SLOT_PFN)
            user.nr_swapped -= 1
        if not slot & SLOT_PRESENT:
            user.slots[at] = 0
            at += 1
            continue
        if slot & SLOT_HUGE:
            read_folio(mem, (slot & SLOT_PFN) & ~<pfn_t> (PAGEBLOCK_PAGES - 1), &folio)
            if at % PAGEBLOCK_PAGES or at + PAGEBLOCK_PAGES > end:
                stop_isolation(mem, &folio)
                split_huge_page(mem, &folio)
                continue
            release_pages(mem, user, pfns, n, cpu)
            n = 0
            detach_page(mem, &folio)
            memset(&user.slots[at], 0, PAGEBLOCK_PAGES * sizeof(uint64_t))
            if not folio.flags[0] & PF_PINNED:
                free_pages(mem, folio.pfn, PAGEBLOCK_ORDER, cpu)
                freed += PAGEBLOCK_PAGES
            at += PAGEBLOCK_PAGES
            continue
        read_folio(mem, slot & SLOT_PFN, &folio)
        detach_page(mem, &folio)
        user.slots[at] = 0
        at += 1
        if folio.flags[0] & PF_PINNED:
            continue
        pfns[n] = folio.pfn
        n += 1
        freed += <int64_t> 1 << user.order
        if n == most:
            release_pages(mem, user, pfns, n, cpu)
            n = 0
    release_pages(mem, user, pfns, n, cpu)
    return freed
