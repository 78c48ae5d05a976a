from typing import Any

import numpy as np
import numpy.typing as npt

page_dtype: np.dtype[np.void]
pageblock_dtype: np.dtype[np.void]
section_dtype: np.dtype[np.void]

KPF_LRU: int
KPF_SLAB: int
KPF_BUDDY: int
KPF_COMPOUND_HEAD: int
KPF_HWPOISON: int
KPF_NOPAGE: int
KPF_OFFLINE: int
KPF_RESERVED: int
KPF_OWNER_PRIVATE: int

class MemMap:
    grouping_disabled: bool
    def __init__(
        self,
        pages: npt.NDArray[Any],
        blocks: npt.NDArray[Any],
        sections: npt.NDArray[Any],
        nr_zones: int,
    ) -> None: ...
    @property
    def journaling(self) -> bool: ...
    @property
    def nr_pages(self) -> int: ...
    def begin_journal(self) -> None: ...
    def end_journal(self, restore: bool) -> None: ...
    def get_pageblock_migratetype(self, pfn: int) -> int: ...
    def set_pageblock_migratetype(self, pfn: int, mt: int) -> None: ...
    def memmap_init_range(
        self, start: int, nr: int, zone_index: int, mt: int, fill: int
    ) -> bool: ...
    def set_page_state(self, pfn: int, flags: int, refcount: int) -> None: ...
    def shrink_search(self, start: int, end: int, zone_index: int, upward: bool) -> int: ...
    def kpageflags(self, start: int, out: npt.NDArray[np.uint64]) -> None: ...
    def is_allocated(self, pfn: int, order: int) -> bool: ...
    def dirty_blocks(self, pfn: int, nr: int) -> int: ...
