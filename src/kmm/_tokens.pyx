"""Whether pages hold what was written to them, at users whose tokens follow from a seed."""
from kmm._freelist cimport prefetch
from kmm._memory cimport PageUser
from kmm._rmap cimport *
from kmm._types cimport *

cdef enum:
    AHEAD = 16                      # pages lie anywhere: the host fetches their tokens ahead


cdef int64_t first_wrong(const mem_t *mem, const user_t *user, uint64_t *have,
                         uint64_t *want) noexcept nogil:
    """The first slot with another content than was written, or -1."""
    cdef int64_t at, i, pages = <int64_t> 1 << user.order
    cdef uint64_t slot
    cdef bint file = user.kind == USER_FILE, lasting = on_lru_kind(user.kind)
    for at in range(<int64_t> user.nr_slots):
        slot = user.slots[at]
        if at + AHEAD < <int64_t> user.nr_slots and user.slots[at + AHEAD] & SLOT_PRESENT:
            prefetch(&mem.tokens[user.slots[at + AHEAD] & SLOT_PFN])
        if not slot and not (user.written[at] and lasting):
            continue
        for i in range(pages):
            want[0] = token_of(user.seed, (<uint64_t> at << user.order) + i)
            if not user.written[at]:
                want[0] = 0
            if slot & SLOT_PRESENT:
                have[0] = mem.tokens[(slot & SLOT_PFN) + i]
            elif slot & SLOT_SWAPPED:
                have[0] = mem.swap.tokens[slot & SLOT_PFN]
            else:
                have[0] = user.store[at] if file else 0
            if have[0] != want[0]:
                return at
    return -1


def wrong_token(PageUser user):
    """Look for a slot that does not hold what was written, wherever that is now.

    Runs without the GIL.

    :return: (slot, what it holds, what was written) of the first, where 0 is nothing; None if
        all is well, or if the user's tokens do not follow from a seed (PageUser.sow).
    """
    cdef int64_t at
    cdef uint64_t have = 0, want = 0
    if not user.user.seed:
        return None
    with nogil:
        at = first_wrong(&user.memmap.mem, &user.user, &have, &want)
    return None if at < 0 else (at, have, want)
