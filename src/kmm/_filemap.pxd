# Pages of files: dirtied, written to the backing store, dropped (mm/filemap.c,
# mm/page-writeback.c, mm/truncate.c).
from kmm._rmap cimport *
from kmm._types cimport *

# Begin to write a dirty page to the backing store: it is clean and under writeback then.
cdef void start_writeback(mem_t *mem, const folio_t *folio) noexcept nogil
# The backing store has it; a page that reclaim waited for comes to the end of its list, which
# needs room for one more entry.
cdef void folio_end_writeback(mem_t *mem, const folio_t *folio) noexcept nogil
