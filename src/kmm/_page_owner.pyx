"""What is in use in a range, and by whom, as rows of an array (mm/page_owner.c)."""
import numpy as np

from kmm._memmap cimport MemMap

cdef in_use_t _row

#: NumPy dtype of a row, derived from the C struct.
in_use_dtype = np.asarray(<in_use_t[:1]> &_row).dtype


def pages_in_use(MemMap memmap, pfn_t start, pfn_t end):
    """List what is in use in a range of pages, upward.

    :param start: first pfn, where a block starts or that is in none; end: pfn behind the last.
    :return: a structured array; ``nr_pages`` of each from ``pfn`` on, who uses them, and as what.
    """
    cdef const mem_t *mem = &memmap.mem
    cdef pfn_t pfn = start
    cdef int64_t n = 0
    cdef in_use_t row
    cdef in_use_t[::1] out
    if not start <= end <= mem.nr_pages:
        raise ValueError(f"pages_in_use: pfns {start:#x} to {end:#x}")
    with nogil:
        while pfn < end:
            pfn = next_in_use(mem, pfn, &row)
            n += row.nr_pages != 0
    rows = np.zeros(n, dtype=in_use_dtype)
    if n == 0:
        return rows
    out = rows
    pfn, n = start, 0
    with nogil:
        while pfn < end:
            pfn = next_in_use(mem, pfn, &row)
            if row.nr_pages:
                out[n] = row
                n += 1
    return rows


def used_by(MemMap memmap, const uint64_t[::1] pfns, int number):
    """Whether each of some pages starts a block that a user has.

    :param pfns: pages; those beyond memory are nobody's.
    :param number: of the user in the machine's table.
    :return: an array of bools.
    """
    cdef mem_t *mem = &memmap.mem
    cdef folio_t folio
    cdef Py_ssize_t i, n = pfns.shape[0]
    found = np.zeros(n, dtype=bool)
    cdef uint8_t[::1] out = found.view(np.uint8)
    with nogil:
        for i in range(n):
            out[i] = read_folio(mem, pfns[i], &folio) and folio.user == number
    return found
