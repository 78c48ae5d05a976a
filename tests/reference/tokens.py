"""What users whose tokens follow from a seed have to hold, slot by slot."""

from __future__ import annotations

from kmm._memory import PageUser
from kmm.machine import Machine
from kmm.params import SLOT_PFN, SLOT_PRESENT, SLOT_SWAPPED, USER_ANON, USER_FILE, USER_SHMEM

_MASK = (1 << 64) - 1


def token_of(seed: int, index: int) -> int:
    """The token of a page, as splitmix64 mixes it."""
    z = seed + index * 0x9E3779B97F4A7C15 & _MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return (z ^ z >> 31) | 1


def wrong_token(m: Machine, user: PageUser, seed: int) -> tuple[int, int, int] | None:
    """The first slot with another content than was written."""
    assert user.written is not None
    for at in range(user.nr_slots):
        slot, written = int(user.slots[at]), bool(user.written[at])
        lasting = user.kind in (USER_ANON, USER_SHMEM, USER_FILE)
        if not slot and not (written and lasting):
            continue
        for i in range(1 << user.order):
            want = token_of(seed, (at << user.order) + i) if written else 0
            if slot & SLOT_PRESENT:
                have = int(m.records.page_tokens[(slot & SLOT_PFN) + i])
            elif slot & SLOT_SWAPPED:
                assert m.swap is not None
                have = int(m.swap.device.tokens[slot & SLOT_PFN])
            else:
                have = int(user.store[at]) if user.store is not None else 0
            if have != want:
                return at, have, want
    return None
