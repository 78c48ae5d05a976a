import numpy as np
import numpy.typing as npt

from kmm._allocator import PageAllocator
from kmm._memory import PageUser

def fault_in_turn(
    user: PageUser,
    m: PageAllocator,
    start: int,
    n: int,
    gfp: int,
    nodes: npt.NDArray[np.int64],
    first: int,
    by_index: bool,
    mask: int,
    cpu: int,
    flags: int,
    hits: npt.NDArray[np.int64],
) -> tuple[int, int]: ...
def touch_in_turn(
    user: PageUser,
    m: PageAllocator,
    slots: npt.NDArray[np.int64],
    gfp: int,
    nodes: npt.NDArray[np.int64],
    first: int,
    by_index: bool,
    mask: int,
    cpu: int,
    hits: npt.NDArray[np.int64],
) -> tuple[int, int]: ...
