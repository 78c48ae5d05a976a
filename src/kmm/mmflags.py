"""Names of gfp flags, as log lines and trace events print them (include/trace/events/mmflags.h)."""

from __future__ import annotations

from kmm import gfp as kmm_gfp

# Matched in this order, each match taken away.
_NAMES = tuple(
    (int(getattr(kmm_gfp, name)), name)
    for name in """GFP_TRANSHUGE GFP_TRANSHUGE_LIGHT GFP_HIGHUSER_MOVABLE GFP_HIGHUSER GFP_USER
    GFP_KERNEL_ACCOUNT GFP_KERNEL GFP_NOFS GFP_ATOMIC GFP_NOIO GFP_NOWAIT GFP_DMA
    __GFP_HIGHMEM GFP_DMA32 __GFP_HIGH __GFP_ATOMIC __GFP_IO __GFP_FS __GFP_NOWARN
    __GFP_RETRY_MAYFAIL __GFP_NOFAIL __GFP_NORETRY __GFP_COMP __GFP_ZERO __GFP_NOMEMALLOC
    __GFP_MEMALLOC __GFP_HARDWALL __GFP_THISNODE __GFP_RECLAIMABLE __GFP_MOVABLE
    __GFP_ACCOUNT __GFP_WRITE __GFP_RECLAIM __GFP_DIRECT_RECLAIM __GFP_KSWAPD_RECLAIM
    __GFP_ZEROTAGS""".split()
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
