import numpy as np
import numpy.typing as npt

from kmm._allocator import PageAllocator
from kmm._buddy import BuddyZone
from kmm._memory import PageUser

Pfns = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]

def take_free(m: PageAllocator, zone: BuddyZone, heads: Pfns, out: Pfns) -> int: ...
def split_free(m: PageAllocator, zone: BuddyZone, heads: Pfns) -> None: ...
def attach_many(
    m: PageAllocator, user: PageUser, start: int, pfns: Pfns, flags: int = 0
) -> None: ...
def release_slots(m: PageAllocator, user: PageUser, indices: Indices, cpu: int) -> int: ...
def hand_over(
    m: PageAllocator, user: PageUser, indices: Indices, other: PageUser, start: int
) -> None: ...
def unmovable_pageblocks(m: PageAllocator, zone: BuddyZone) -> tuple[int, int]: ...
