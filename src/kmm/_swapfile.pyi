import numpy as np
import numpy.typing as npt

from kmm._memmap import MemMap

class SwapDevice:
    owner: npt.NDArray[np.uint64]
    tokens: npt.NDArray[np.uint64]
    cluster: npt.NDArray[np.uint16]
    def __init__(self, memmap: MemMap, nr_pages: int) -> None: ...
    @property
    def nr_slots(self) -> int: ...
    @property
    def nr_used(self) -> int: ...
