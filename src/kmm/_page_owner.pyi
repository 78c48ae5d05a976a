from typing import Any

import numpy as np
import numpy.typing as npt

from kmm._memmap import MemMap

in_use_dtype: np.dtype[Any]

def pages_in_use(memmap: MemMap, start: int, end: int) -> npt.NDArray[Any]: ...
def used_by(memmap: MemMap, pfns: npt.NDArray[np.uint64], number: int) -> npt.NDArray[np.bool_]: ...
