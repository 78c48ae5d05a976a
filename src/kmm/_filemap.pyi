from kmm._allocator import PageAllocator
from kmm._memory import PageUser

def write_cache_pages(
    user: PageUser, m: PageAllocator, start: int, n: int, nr_to_write: int, waits: bool
) -> tuple[int, int]: ...
def end_writeback(user: PageUser, m: PageAllocator, start: int, n: int) -> int: ...
def touch(
    user: PageUser,
    m: PageAllocator,
    start: int,
    n: int,
    write: bool,
    gfp: int,
    nid: int,
    nodes: int,
    cpu: int,
) -> int: ...
def write_present(user: PageUser, m: PageAllocator, start: int, n: int) -> None: ...
def bring_in(user: PageUser, m: PageAllocator, index: int, pfn: int, write: bool) -> None: ...
def invalidate_mapping_pages(
    user: PageUser, m: PageAllocator, start: int, n: int, cpu: int
) -> int: ...
