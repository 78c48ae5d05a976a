import numpy as np
import numpy.typing as npt

from kmm._memmap import MemMap
from kmm.trace import Kprobes

class PageAllocator:
    this_cpu: int
    kprobes: Kprobes | None
    def alloc_pages(
        self, order: int = 0, gfp: int = ..., nid: int | None = None, cpu: int | None = None
    ) -> int: ...
    def free_pages(self, pfn: int, order: int = 0, cpu: int | None = None) -> None: ...
    def alloc_pages_bulk(
        self,
        n: int,
        order: int = 0,
        gfp: int = ...,
        nid: int | None = None,
        out: npt.NDArray[np.uint64] | None = None,
        cpu: int | None = None,
    ) -> npt.NDArray[np.uint64]: ...
    def free_pages_bulk(
        self, pfns: npt.ArrayLike, order: int = 0, cpu: int | None = None
    ) -> None: ...
    def split_page(self, pfn: int, order: int) -> None: ...
    def _attach(self, memmap: MemMap, records_kept: int) -> None: ...
    def _request(self, gfp: int, order: int, nid: int, nodes: int, cpu: int) -> int: ...
    def _release(self, pfn: int, order: int, cpu: int) -> int: ...
    def _unreserve_highatomic(self, gfp: int, nid: int, nodes: int) -> bool: ...
