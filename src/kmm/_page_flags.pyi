import numpy as np
import numpy.typing as npt

from kmm._memmap import MemMap

def pageblock_counts(memmap: MemMap, start: int, end: int, zone_index: int) -> list[int]: ...
def kpageflags(memmap: MemMap, start: int, out: npt.NDArray[np.uint64]) -> None: ...
def kpageflags_runs(
    memmap: MemMap,
    start: int,
    end: int,
    lengths: npt.NDArray[np.uint64],
    words: npt.NDArray[np.uint64],
) -> tuple[int, int]: ...
