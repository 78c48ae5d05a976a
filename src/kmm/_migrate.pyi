import numpy as np
import numpy.typing as npt

from kmm._allocator import PageAllocator
from kmm._memmap import MemMap

def scan_movable_pages(memmap: MemMap, start: int, end: int) -> tuple[int, int]: ...
def isolate_range(
    memmap: MemMap,
    start: int,
    end: int,
    out: npt.NDArray[np.uint64],
    refused: npt.NDArray[np.uint64],
) -> tuple[int, int]: ...
def putback_movable_pages(memmap: MemMap, pfns: npt.NDArray[np.uint64]) -> None: ...
def migrate_batches(
    m: PageAllocator,
    pfns: npt.NDArray[np.uint64],
    status: npt.NDArray[np.uint8],
    at: int,
    gfp: int,
    nid: int,
    nodes: int,
    cpu: int,
    mode: int,
    to: npt.NDArray[np.uint64],
) -> tuple[int, int, int]: ...
def migrate_pages_once(
    m: PageAllocator,
    pfns: npt.NDArray[np.uint64],
    status: npt.NDArray[np.uint8],
    at: int,
    end: int,
    gfp: int,
    nid: int,
    nodes: int,
    cpu: int,
    mode: int,
    force: bool,
    to: npt.NDArray[np.uint64],
) -> int: ...
def migrate_to(m: PageAllocator, pfn: int, to: int, cpu: int, poison: bool = False) -> bool: ...
def count_moved(
    memmap: MemMap, status: npt.NDArray[np.uint8], to: npt.NDArray[np.uint64]
) -> tuple[int, int]: ...
def split_isolated(m: PageAllocator, pfn: int) -> None: ...
