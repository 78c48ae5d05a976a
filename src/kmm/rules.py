"""What differs between kernel releases, under names that say what differs.

Chains and mechanisms ask ``m.rules``; nothing compares a release number.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rules:
    """The ways of one kernel release."""

    release: str
    #: Whether memory may hold its own memmap only if it is added one block at a time.
    memmap_on_memory_is_one_block: bool
    #: Whether a Movable zone takes part when min_free_kbytes is shared out.
    movable_shares_min_free_kbytes: bool
    #: Whether the machine's pages, by which min_free_kbytes is shared out, are cut to 32 bits:
    #: beyond 16 TiB every zone's marks are then larger than meant.
    watermark_divisor_is_32_bits: bool


LINUX_6_1 = Rules(
    release="6.1",
    memmap_on_memory_is_one_block=True,
    movable_shares_min_free_kbytes=True,
    watermark_divisor_is_32_bits=True,
)
