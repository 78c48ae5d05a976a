"""The flags that a request for memory carries (include/linux/gfp_types.h, gfp.h)."""

from __future__ import annotations

from kmm.params import ZONE_DMA, ZONE_DMA32, ZONE_MOVABLE, ZONE_NORMAL

__GFP_DMA: int = 0x1
__GFP_HIGHMEM: int = 0x2
__GFP_DMA32: int = 0x4
__GFP_MOVABLE: int = 0x8
__GFP_RECLAIMABLE: int = 0x10
__GFP_HIGH: int = 0x20
__GFP_IO: int = 0x40
__GFP_FS: int = 0x80
__GFP_ZERO: int = 0x100
__GFP_ATOMIC: int = 0x200
__GFP_DIRECT_RECLAIM: int = 0x400
__GFP_KSWAPD_RECLAIM: int = 0x800
__GFP_WRITE: int = 0x1000
__GFP_NOWARN: int = 0x2000
__GFP_RETRY_MAYFAIL: int = 0x4000
__GFP_NOFAIL: int = 0x8000
__GFP_NORETRY: int = 0x10000
__GFP_MEMALLOC: int = 0x20000
__GFP_COMP: int = 0x40000
__GFP_NOMEMALLOC: int = 0x80000
__GFP_HARDWALL: int = 0x100000
__GFP_THISNODE: int = 0x200000
__GFP_ACCOUNT: int = 0x400000
__GFP_ZEROTAGS: int = 0x800000
__GFP_RECLAIM: int = __GFP_DIRECT_RECLAIM | __GFP_KSWAPD_RECLAIM
#: All bits that a request may carry.
GFP_BITS = 0xFFFFFFF

GFP_DMA: int = __GFP_DMA
GFP_DMA32: int = __GFP_DMA32
GFP_NOWAIT: int = __GFP_KSWAPD_RECLAIM
GFP_NOIO: int = __GFP_RECLAIM
GFP_ATOMIC: int = __GFP_HIGH | __GFP_ATOMIC | __GFP_KSWAPD_RECLAIM
GFP_NOFS: int = __GFP_RECLAIM | __GFP_IO
GFP_KERNEL: int = GFP_NOFS | __GFP_FS
GFP_KERNEL_ACCOUNT: int = GFP_KERNEL | __GFP_ACCOUNT
GFP_USER: int = GFP_KERNEL | __GFP_HARDWALL
GFP_HIGHUSER: int = GFP_USER | __GFP_HIGHMEM
GFP_HIGHUSER_MOVABLE: int = GFP_HIGHUSER | __GFP_MOVABLE
GFP_TRANSHUGE_LIGHT: int = (
    GFP_HIGHUSER_MOVABLE | __GFP_COMP | __GFP_NOMEMALLOC | __GFP_NOWARN
) & ~__GFP_RECLAIM
GFP_TRANSHUGE: int = GFP_TRANSHUGE_LIGHT | __GFP_DIRECT_RECLAIM


def gfp_zone(gfp: int) -> int:
    """Return the highest zone that a request may use; MOVABLE counts only with HIGHMEM."""
    if gfp & __GFP_DMA:
        return ZONE_DMA
    if gfp & __GFP_DMA32:
        return ZONE_DMA32
    both = __GFP_HIGHMEM | __GFP_MOVABLE
    return ZONE_MOVABLE if gfp & both == both else ZONE_NORMAL
