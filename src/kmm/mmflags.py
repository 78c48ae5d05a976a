"""Names of gfp flags, as log lines and trace events print them (include/trace/events/mmflags.h)."""

from __future__ import annotations

# Matched in this order, each match taken away.
_NAMES = (
    (0x1C24CA, "GFP_TRANSHUGE"),
    (0x1C20CA, "GFP_TRANSHUGE_LIGHT"),
    (0x100CCA, "GFP_HIGHUSER_MOVABLE"),
    (0x100CC2, "GFP_HIGHUSER"),
    (0x100CC0, "GFP_USER"),
    (0x400CC0, "GFP_KERNEL_ACCOUNT"),
    (0xCC0, "GFP_KERNEL"),
    (0xC40, "GFP_NOFS"),
    (0xA20, "GFP_ATOMIC"),
    (0xC00, "GFP_NOIO"),
    (0x800, "GFP_NOWAIT"),
    (0x1, "GFP_DMA"),
    (0x2, "__GFP_HIGHMEM"),
    (0x4, "GFP_DMA32"),
    (0x20, "__GFP_HIGH"),
    (0x200, "__GFP_ATOMIC"),
    (0x40, "__GFP_IO"),
    (0x80, "__GFP_FS"),
    (0x2000, "__GFP_NOWARN"),
    (0x4000, "__GFP_RETRY_MAYFAIL"),
    (0x8000, "__GFP_NOFAIL"),
    (0x10000, "__GFP_NORETRY"),
    (0x40000, "__GFP_COMP"),
    (0x100, "__GFP_ZERO"),
    (0x80000, "__GFP_NOMEMALLOC"),
    (0x20000, "__GFP_MEMALLOC"),
    (0x100000, "__GFP_HARDWALL"),
    (0x200000, "__GFP_THISNODE"),
    (0x10, "__GFP_RECLAIMABLE"),
    (0x8, "__GFP_MOVABLE"),
    (0x400000, "__GFP_ACCOUNT"),
    (0x1000, "__GFP_WRITE"),
    (0xC00, "__GFP_RECLAIM"),
    (0x400, "__GFP_DIRECT_RECLAIM"),
    (0x800, "__GFP_KSWAPD_RECLAIM"),
    (0x800000, "__GFP_ZEROTAGS"),
)


def gfp_flag_names(gfp: int) -> str:
    """Return the names of a gfp mask, joined by ``|``; what has none in hexadecimal."""
    names = []
    for bits, name in _NAMES:
        if gfp & bits == bits:
            names.append(name)
            gfp &= ~bits
    if gfp:
        names.append(f"{gfp:#x}")
    return "|".join(names) or "none"
