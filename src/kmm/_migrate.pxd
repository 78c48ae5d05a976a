# Moving used pages (mm/migrate.c).
from kmm._rmap cimport *
from kmm._types cimport *

# Take a page that can move off its list, or from its driver, and keep it from others.
cdef void isolate_folio(mem_t *mem, const folio_t *folio) noexcept nogil
# Give it back to where it came from.
cdef void putback_folio(mem_t *mem, const folio_t *folio) noexcept nogil
# Let a block that was handed out take the place of an isolated one of its size, which is then
# handed out and nobody's.
cdef void move_folio(mem_t *mem, const folio_t *folio, pfn_t to) noexcept nogil
