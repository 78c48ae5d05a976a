# Flags of a request for memory, numbered as in gfp.py, which has the kernel's names: two leading
# underscores would be mangled inside a class.

cdef enum:
    GFP_BIT_DMA = 0x1
    GFP_BIT_HIGHMEM = 0x2
    GFP_BIT_DMA32 = 0x4
    GFP_BIT_MOVABLE = 0x8
    GFP_BIT_RECLAIMABLE = 0x10
    GFP_BIT_HIGH = 0x20
    GFP_BIT_IO = 0x40
    GFP_BIT_FS = 0x80
    GFP_BIT_ATOMIC = 0x200
    GFP_BIT_DIRECT_RECLAIM = 0x400
    GFP_BIT_KSWAPD_RECLAIM = 0x800
    GFP_BIT_RETRY_MAYFAIL = 0x4000
    GFP_BIT_NOFAIL = 0x8000
    GFP_BIT_NORETRY = 0x10000
    GFP_BIT_MEMALLOC = 0x20000
    GFP_BIT_COMP = 0x40000
    GFP_BIT_NOMEMALLOC = 0x80000
    GFP_BIT_THISNODE = 0x200000
    GFP_BIT_RECLAIM = 0xC00
    GFP_BITS = 0xFFFFFFF

cdef enum:
    GFP_ATOMIC = 0xA20
    GFP_KERNEL = 0xCC0
    GFP_HIGHUSER_MOVABLE = 0x100CCA
    GFP_TRANSHUGE = 0x1C24CA
