import numpy as np
import numpy.typing as npt

from kmm._allocator import PageAllocator
from kmm._memory import PageUser

def touch_slots(
    user: PageUser,
    m: PageAllocator,
    slots: npt.NDArray[np.int64],
    gfp: int,
    nid: int,
    nodes: int,
    cpu: int,
    flags: int = 0,
) -> int: ...
def churn_slots(
    user: PageUser,
    m: PageAllocator,
    slots: npt.NDArray[np.int64],
    gfp: int,
    nid: int,
    nodes: int,
    cpu: int,
) -> tuple[int, int, int]: ...
