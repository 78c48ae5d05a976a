# What the host knows of a mounted tree: see _fuse_names.pyx.
from libc.stdint cimport uint64_t
from posix.stat cimport struct_stat
from posix.types cimport mode_t, off_t

cdef enum:
    OF_BLOCK = 8
    NAME_MAX = 255

cdef class Node:
    cdef uint64_t ino, nlookup
    cdef str path
    cdef long block_id  # of the memory block that it belongs to, or -1
    cdef int what  # which of OF_A_BLOCK
    # Its listing (a block's excepted), and as of when.  A name has a number as long as it is there,
    # higher than those before it; None stands for 1, 2, 3 and so on.
    cdef list names, numbers
    cdef long last_number
    cdef object changes
    cdef object block(self)

cdef class BlockListing:
    cdef bytes names
    cdef Py_ssize_t at, place  # of valid_zones: bytes, and the number of the name

cdef const char **OF_A_BLOCK
cdef object answers, tree, lock, unlock
cdef double keep_names
cdef void *session  # struct fuse_session
cdef dict changed  # modes and owners that were set, by path
cdef dict nodes  # by number
cdef dict by_path
cdef set listed  # the numbers of directories whose listings the host may have kept
cdef char *listing  # where the answer to a listing is put together

cdef int start(object operations, double keep) except -1
cdef int failed(object error) noexcept
cdef void told(Node node) noexcept
cdef void untold(uint64_t ino, uint64_t times) noexcept
cdef Node node_at(uint64_t ino)
cdef Node child(Node parent, const char *name)
cdef void set_attr(struct_stat *st, Node node) except *
cdef size_t fill(void *req, Node node, size_t size, off_t offset) except? 0
cdef void forget_names() noexcept
