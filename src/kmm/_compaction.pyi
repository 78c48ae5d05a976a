from typing import TypedDict

from kmm._allocator import PageAllocator
from kmm._buddy import BuddyZone

class CompactState(TypedDict):
    cached_free_pfn: int
    cached_migrate_pfn: list[int]
    init_migrate_pfn: int
    init_free_pfn: int
    considered: int
    defer_shift: int
    order_failed: int
    blockskip_flush: int

def compact_zone(
    m: PageAllocator,
    zone: BuddyZone,
    order: int,
    migratetype: int,
    mode: int,
    flags: int,
    alloc_flags: int,
    highest_zoneidx: int,
    extfrag_threshold: int,
    proactive_low: int,
    cpu: int,
    capture: bool,
) -> tuple[int, int, int, int]: ...
def compaction_suitable(
    zone: BuddyZone,
    order: int,
    alloc_flags: int,
    highest_zoneidx: int,
    extfrag_threshold: int,
    free: int,
) -> int: ...
def fragmentation_index(zone: BuddyZone, order: int) -> int: ...
def unusable_free_index(zone: BuddyZone, order: int) -> int: ...
def extfrag_for_order(zone: BuddyZone, order: int) -> int: ...
def reset_skip_bits(m: PageAllocator, zone: BuddyZone) -> None: ...
def pageblock_skip(m: PageAllocator, pfn: int) -> bool: ...
def compact_state(zone: BuddyZone) -> CompactState: ...
def set_compact_state(zone: BuddyZone, **values: int | list[int]) -> None: ...
