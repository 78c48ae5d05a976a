# The only C types of the project: page frame numbers, the page, pageblock and section
# records, a zone's free lists and the per-CPU lists.  All zero bytes is a valid state of
# every record, so a fresh reservation of virtual memory is a valid memmap.
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from kmm._vmstat cimport NR_NODE_STATS, NR_VM_EVENTS, NR_ZONE_STATS

ctypedef uint64_t pfn_t

cdef enum:
    MAX_ORDER = 11                  # orders 0..10
    PAGEBLOCK_ORDER = 9
    PAGEBLOCK_PAGES = 512
    MAX_ORDER_PAGES = 1024
    SECTION_PFN_SHIFT = 15
    SECTION_PAGES = 32768
    MIGRATE_TYPES = 5
    PCP_LISTS = 14
    NR_ZONES = 5

cdef enum:
    MIGRATE_UNMOVABLE = 0
    MIGRATE_MOVABLE = 1
    MIGRATE_RECLAIMABLE = 2
    MIGRATE_HIGHATOMIC = 3
    MIGRATE_ISOLATE = 4

# pageblock_t.kind: what block of order 9 or 10 starts there.
cdef enum:
    KIND_NONE = 0                   # tail, or no block starts here
    KIND_BUDDY = 1                  # free, on a zone's list
    KIND_PCP = 2                    # free, on a per-CPU list
    KIND_ALLOCATED = 3              # handed out

# The state of a page, a byte: what block below order 9 starts there.  Bytes stand apart from the
# records, so that a line of the cache tells of 64 pages, and asking costs no miss of its own.
cdef enum:
    STATE_NONE = 0                  # tail, or no block starts here
    STATE_ALLOCATED = 0x20          # handed out; order in bits 0..3
    STATE_MARKED = 0x10             # and its record's flags say more
    STATE_PCP = 0x40                # on a per-CPU list; order in bits 0..1, type in bits 2..3
    STATE_BUDDY = 0x80              # on a zone's list; order in bits 0..3, type in bits 4..6
    STATE_ORDER = 0xF

# page_t.flags, and pageblock_t.flags where a block of order 9 and more is in use: marks of pages.
cdef enum:
    PF_RESERVED = 1 << 0
    PF_SLAB = 1 << 1
    PF_LRU = 1 << 2
    PF_OWNER_PRIV = 1 << 3
    PF_HWPOISON = 1 << 4
    PF_OFFLINE = 1 << 5
    PF_MOVABLE_OPS = 1 << 6
    PF_TAKEN = 1 << 7               # broken, or dropped with one that is: in nobody's hands
    PF_USER = 1 << 8                # the links hold who uses it, and as what
    PF_ACTIVE = 1 << 9
    PF_REFERENCED = 1 << 10
    PF_DIRTY = 1 << 11
    PF_WRITEBACK = 1 << 12
    PF_MLOCKED = 1 << 13            # on the unevictable list, which is only counted
    PF_PINNED = 1 << 14             # somebody holds a reference for long: it stays where it is
    PF_ISOLATED = 1 << 15           # taken off its LRU list, or from its driver, to be moved

# node_t.reclaim_flags
cdef enum:
    PGDAT_DIRTY = 1                 # the ends of its lists are all dirty: kswapd may write
    PGDAT_WRITEBACK = 2             # and all under writeback
    PGDAT_CONGESTED = 4             # pages come round before they are written

# What uses pages; of PF_LRU pages it tells the list too.
cdef enum:
    USER_NONE = 0
    USER_ANON = 1
    USER_SHMEM = 2
    USER_FILE = 3
    USER_SLAB_RECLAIMABLE = 4
    USER_SLAB_UNRECLAIMABLE = 5
    USER_STACK = 6
    USER_PAGE_TABLE = 7
    USER_KERNEL = 8                 # whatever else the kernel keeps for itself
    USER_MOVABLE_OPS = 9            # a driver's that can move them
    USER_OFFLINE = 10               # a balloon's or virtio-mem's: PageOffline
    USER_HUGETLB = 11

# A slot of a user: 0, or a page, or where its content went.
cdef enum:
    SLOT_PFN_BITS = 40

# A node's LRU lists.
cdef enum:
    LRU_INACTIVE_ANON = 0
    LRU_ACTIVE_ANON = 1
    LRU_INACTIVE_FILE = 2
    LRU_ACTIVE_FILE = 3
    LRU_UNEVICTABLE = 4
    NR_LRU_LISTS = 4                # of those with an order

# pageblock_t.state: page records below this block were written; the host keeps them.
cdef enum:
    BLOCK_FILL = 0x7F
    BLOCK_DIRTY = 0x80

# The fill of a pageblock: what the pages of the block are whose own record is still zero.
cdef enum:
    FILL_NONE = 0
    FILL_RESERVED = 1               # boot memory that was never freed
    FILL_VMEMMAP = 2                # memmap that describes its own memory block
    FILL_KERNEL = 3                 # handed out by the kernel before the machine's story begins

cdef enum:
    SECTION_MARKED_PRESENT = 1
    SECTION_HAS_MEM_MAP = 2
    SECTION_IS_ONLINE = 4
    SECTION_IS_EARLY = 8

cdef enum:
    FPI_NONE = 0
    FPI_TO_TAIL = 2

cdef enum:
    WMARK_MIN = 0
    WMARK_LOW = 1
    WMARK_HIGH = 2
    ALLOC_WMARK_MASK = 3
    ALLOC_NO_WATERMARKS = 0x04
    ALLOC_OOM = 0x08
    ALLOC_NON_BLOCK = 0x10
    ALLOC_MIN_RESERVE = 0x20
    ALLOC_CPUSET = 0x40             # held to the node mask
    ALLOC_NOFRAGMENT = 0x100
    ALLOC_HIGHATOMIC = 0x200
    ALLOC_KSWAPD = 0x800
    ALLOC_RESERVES = 0x238          # OOM, NON_BLOCK, MIN_RESERVE, HIGHATOMIC

# Links of free pages, each with its high part in a byte of its own: writing one reads nothing,
# so a neighbour that is not in the cache does not stop the one who writes it.  Of pages that are
# on no list the links are stale.  A page with PF_USER has its user, its index there and the tag of
# its entry on an LRU list in them (_rmap.pxd).
cdef struct page_t:
    uint32_t next
    uint32_t prev
    uint8_t next_hi
    uint8_t prev_hi
    uint16_t flags

cdef struct pageblock_t:
    uint32_t next                   # next block of order 9 or 10 on the list, pfn >> 9, 0 ends it
    uint32_t prev
    uint16_t zone                   # index into the zone table plus one, 0: in no zone
    uint16_t flags                  # of the block in use that starts here: PF_*
    uint8_t kind
    uint8_t order
    uint8_t mt                      # the list that this block is on; with PF_USER part of its user
    uint8_t state                   # FILL_* and BLOCK_DIRTY

cdef struct section_t:
    uint64_t subsection_map
    uint64_t pageblock_flags[4]
    uint16_t flags
    uint16_t nid
    uint32_t unused[5]              # to 64 bytes: one cache line a section

cdef struct free_list_t:
    uint64_t head
    uint64_t tail
    uint64_t count

cdef struct per_cpu_pages_t:
    int32_t count
    int32_t high
    int32_t batch
    int32_t free_factor
    free_list_t lists[PCP_LISTS]
    int64_t allocs[4]               # blocks of order 0 to 3 handed out, and taken back, the short
    int64_t frees[4]                # way: parts of the zone's counters that vm_events adds up

# What a zone remembers of compaction (the compact_* fields of struct zone).
cdef struct compact_t:
    uint64_t cached_free_pfn
    uint64_t cached_migrate_pfn[2]  # of asynchronous runs and of others
    uint64_t init_migrate_pfn
    uint64_t init_free_pfn
    int32_t considered
    int32_t defer_shift
    int32_t order_failed
    int32_t blockskip_flush

# The block that whoever compacts waits for: taken on its way to the free lists.
cdef struct capture_t:
    zone_t *zone
    int32_t order
    int64_t pfn                     # -1 while there is none

cdef struct zone_t:
    uint64_t zone_start_pfn
    uint64_t spanned_pages
    int64_t present_pages
    int64_t present_early_pages
    int64_t managed_pages
    int64_t nr_free_pages
    int64_t nr_isolate_pageblock
    int64_t nr_reserved_highatomic
    int64_t watermark_min
    int64_t watermark_low
    int64_t watermark_high
    int64_t watermark_boost
    int64_t lowmem_reserve[NR_ZONES]
    int64_t pageset_high            # what the per-CPU lists were last set to
    int64_t pageset_batch
    int64_t stat_threshold
    int64_t boosted                 # ZONE_BOOSTED_WATERMARK
    int64_t numa_hit
    int64_t numa_miss
    int64_t numa_foreign
    int64_t numa_local
    int64_t numa_other
    int64_t nr_dirty_free           # free pageblocks whose page records the host still keeps
    int64_t dirty_free_limit        # from how many on some are given back
    int64_t stat[NR_ZONE_STATS]
    int64_t pgalloc                 # pages handed out and taken back since boot
    int64_t pgfree
    uint32_t free_mask[8]           # per migratetype: bit o is set while a block of order o is free
    free_list_t free_area[MIGRATE_TYPES][MAX_ORDER]
    int32_t index                   # in the zone table
    int32_t zone_idx                # DMA 0 ... Device 4
    int32_t nid
    int32_t nr_cpus
    int32_t boost_factor            # vm.watermark_boost_factor
    int32_t reclaim_active          # ZONE_RECLAIM_ACTIVE
    int32_t high_when_idle          # of the per-CPU lists, while reclaim makes it less
    compact_t compact
    per_cpu_pages_t *pcp            # nr_cpus of them

# One node's zones in the order in which they are asked, and who woke its kswapd for what.
cdef struct zonelist_t:
    int32_t nr
    int32_t first[NR_ZONES]         # per highest zone index: the first zone that may serve, or nr
    zone_t **zones

# The order of an LRU list: entries of a pfn and a tag, the latest first.  A page that leaves the
# list leaves its entry behind, which counts for nothing, as the page does not bear its tag.
cdef struct lru_list_t:
    uint64_t *ring                  # room is a power of two
    uint64_t room
    uint64_t head                   # where the next entry goes, counted from the beginning of time
    uint64_t tail                   # the oldest entry
    uint64_t nr_live                # entries that count; head - tail is never less

cdef struct node_t:
    lru_list_t lru[NR_LRU_LISTS]
    int64_t stat[NR_NODE_STATS]
    zonelist_t fallback
    zonelist_t nofallback
    int64_t kswapd_wakeups
    int32_t nr_cpus
    int32_t kswapd_order            # -1: nobody woke it
    int32_t kswapd_highest_zoneidx
    int32_t kswapd_pending          # somebody woke it since it last looked
    int32_t kswapd_failures
    int32_t reclaim_flags           # PGDAT_*
    int64_t anon_cost               # what reclaim paid for pages of each sort, lately
    int64_t file_cost

# Who uses pages: a table from index to page, and what becomes of its pages.
cdef struct user_t:
    uint64_t *slots
    uint64_t nr_slots               # of blocks of `order` each
    int64_t nr_present              # slots with a page
    int64_t nr_came                 # how often a slot got one since the user was made
    int64_t nr_swapped              # slots whose content is on the swap device
    int64_t nr_dirty                # of a file: pages that its backing store does not have
    uint64_t *store                 # by index: the tokens of a file's pages on its backing store
    uint64_t seed                   # from which tokens of new pages follow, 0 if they are zeros
    uint8_t *written                # by index, with a seed: whether it has to hold its token
    int32_t order
    uint8_t kind                    # USER_*
    uint8_t tokens                  # whether pages carry tokens
    uint8_t mapped                  # a file's pages are mapped: they count as such
    uint8_t locked                  # pages are mlocked as they come

# The swap device: who has a slot (user << 40 | index, plus one), and the token put there.
cdef struct swap_t:
    uint64_t *owner
    uint64_t *tokens
    int64_t nr_slots
    int64_t nr_used
    uint16_t *cluster               # per 512 slots: how many are in use
    int64_t cursor                  # where the search for a free slot begins

# Old contents of records, so that a chain that fails can put them back.
cdef struct journal_entry_t:
    void *where
    uint64_t old[2]
    uint64_t size                   # bytes, at most 16

cdef struct journal_t:
    journal_entry_t *entries
    uint64_t count
    uint64_t room
    int32_t lost                    # an entry could not be kept

cdef struct mem_t:
    page_t *pages                   # indexed by pfn
    uint8_t *states                 # indexed by pfn
    pageblock_t *blocks             # indexed by pfn >> 9
    section_t *sections             # indexed by pfn >> 15
    zone_t **zones
    node_t *nodes
    int32_t *node_of_cpu
    uint64_t nr_pages               # addressable
    int32_t nr_zones
    int32_t nr_nodes
    int32_t nr_cpus
    int32_t nr_online_nodes
    int32_t grouping_disabled       # page_group_by_mobility_disabled
    int32_t poisoned                # blocks that are freed may hold poisoned pages
    journal_t *journal              # NULL while nothing has to be undone
    uint64_t *tokens                # by pfn: what the pages of users with tokens hold
    user_t **users                  # by number, from 1; NULL where there is none
    int32_t nr_users                # room in that table
    swap_t swap
    int64_t events[NR_VM_EVENTS]
    capture_t *capture              # NULL while nobody compacts for a request
