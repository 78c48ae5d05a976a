import numpy as np
import numpy.typing as npt

from kmm._allocator import PageAllocator
from kmm._memmap import MemMap

def isolate_migratepages_range(
    memmap: MemMap, start: int, end: int, want: int, out: npt.NDArray[np.uint64]
) -> tuple[int, int, int, bool]: ...
def reclaim_clean_pages_from_list(
    m: PageAllocator, pfns: npt.NDArray[np.uint64], dropped: npt.NDArray[np.uint8], cpu: int
) -> int: ...
