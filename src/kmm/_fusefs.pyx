"""The callbacks of libfuse that programs cause most, without the detour through ctypes.

A process serves one mount, so what answers is kept here.  Nothing of libfuse is needed to build
this: where its structures differ between versions, ``install`` is told.
"""

from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport EBADF, EIO, ENODEV
from libc.stdint cimport uint64_t
from libc.string cimport memcpy, memset, strcmp, strlen, strncmp
from posix.stat cimport struct_stat
from posix.types cimport off_t

import sys
import traceback

ctypedef int (*fill_dir_t)(void *, const char *, const struct_stat *, off_t, int) noexcept nogil

cdef enum:
    FUSE_READDIR_PLUS = 1
    FUSE_FILL_DIR_PLUS = 2
    S_IFMT = 0o170000
    S_IFREG = 0o100000
    FILE_INFO_MAX = 64
    O_ACCMODE = 3
    OF_BLOCK = 8

cdef object answers = None
cdef struct_stat blank
cdef unsigned char open_bits[FILE_INFO_MAX]
cdef unsigned char pipe_bits[FILE_INFO_MAX]
cdef Py_ssize_t info_size = 0, fh_at = 0

# Programs ask for thousands of memory blocks, each of which has these, with the same attributes.
cdef const char *BLOCK = "/sys/devices/system/memory/memory"
cdef const char **OF_A_BLOCK = [
    "", "/online", "/phys_device", "/phys_index", "/removable", "/state", "/uevent", "/valid_zones"
]
cdef list block_attrs = [None] * OF_BLOCK
cdef list block_shows = [None] * OF_BLOCK


def install(operations, dict shows, Py_ssize_t fh_offset, bytes opened, bytes pipe):
    """Say who answers.

    :param operations: has attr, listing and open_file (see fusefs.TreeOperations), and the tree.
    :param shows: what the files of a memory block show, by name (sysfs_memory.BLOCK_SHOWS).
    :param fh_offset: where fuse_file_info keeps ``fh``, bytes; opened, pipe: that structure with
        the bits set that an open file wants, and an open pipe.
    :return: the addresses of the callbacks by their names in fuse_operations.
    """
    global answers, info_size, fh_at
    cdef int i
    if len(opened) > FILE_INFO_MAX or len(opened) != len(pipe) or fh_offset + 8 > len(opened):
        raise ValueError(f"fuse_file_info of {len(opened)} bytes")
    answers, info_size, fh_at = operations, len(opened), fh_offset
    for i in range(OF_BLOCK):
        block_attrs[i] = None
        block_shows[i] = shows.get((<bytes>OF_A_BLOCK[i]).decode()[1:])
    memcpy(open_bits, <const char *>opened, info_size)
    memcpy(pipe_bits, <const char *>pipe, info_size)
    memset(&blank, 0, sizeof(blank))
    blank.st_nlink = 1  # of directories, which nobody has counted
    blank.st_uid, blank.st_gid = operations.owner
    blank.st_atime = blank.st_mtime = blank.st_ctime = operations.born
    return {
        "getattr": <size_t>&fs_getattr,
        "open": <size_t>&fs_open,
        "read": <size_t>&fs_read,
        "release": <size_t>&fs_release,
        "readdir": <size_t>&fs_readdir,
    }


cdef int failed(object error) noexcept:
    """Return what libfuse hands on as the errno; what is no refusal is a fault of kmm's."""
    if isinstance(error, OSError) and error.errno:
        return -<int>error.errno
    traceback.print_exception(error, file=sys.stderr)
    return -EIO


cdef inline uint64_t *fh_of(void *fi) noexcept nogil:
    return <uint64_t *>(<char *>fi + fh_at)


cdef class OpenBlockFile:
    """A file that tells of a memory block, open for reading: its text as of the latest read from
    its start."""

    cdef object block, show
    cdef bytes text

    def __init__(self, block, show):
        self.block, self.show, self.text = block, show, None

    cdef bytes read_text(self):
        tree = answers.tree
        with tree.lock:
            m = tree.m
            if m.memory_blocks.get(self.block.block_id) is not self.block:
                raise OSError(ENODEV, "the block is gone")
            return self.show(m, self.block).encode()


cdef object block_at(const char *path, int *what):
    """Return the memory block that a path is of, with what of it in ``what``; None if it is of
    something else, or such a thing that the tree has to be asked."""
    cdef size_t at = strlen(BLOCK)
    cdef int digits = 0, i
    cdef long number = 0
    if strncmp(path, BLOCK, at):
        return None
    while c"0" <= path[at] <= c"9" and digits < 9:
        number = number * 10 + path[at] - c"0"
        at, digits = at + 1, digits + 1
    if not digits or (digits > 1 and path[at - digits] == c"0"):
        return None
    for i in range(OF_BLOCK):
        if not strcmp(path + at, OF_A_BLOCK[i]):
            what[0] = i
            return answers.tree.m.memory_blocks.get(number)
    return None


cdef object attr_at(const char *path):
    cdef int what = 0
    with answers.tree.lock:
        if block_at(path, &what) is None:
            return answers.attr((<bytes>path).decode("utf-8", "surrogateescape"))
        if block_attrs[what] is None:
            block_attrs[what] = answers.attr((<bytes>path).decode("utf-8", "surrogateescape"))
        return block_attrs[what]


cdef object opened_block_file(const char *path):
    """Return an open file, or None if the tree has to open it."""
    cdef int what = 0
    tree = answers.tree
    with tree.lock:
        block = block_at(path, &what)
        if block is None or block_shows[what] is None:
            return None
        # A saved machine may show a text in the words it was saved in.
        saved = tree.m.saved_texts
        if saved and (<bytes>path).decode() in saved:
            return None
        return OpenBlockFile(block, block_shows[what])


cdef int fs_getattr(const char *path, struct_stat *st, void *fi) noexcept with gil:
    try:
        attr = attr_at(path)
        st[0] = blank
        st.st_mode, st.st_size = attr.mode, attr.size
        return 0
    except BaseException as e:
        return failed(e)


cdef int fs_open(const char *path, void *fi) noexcept with gil:
    cdef Py_ssize_t i
    cdef unsigned char *bits = open_bits
    try:
        file = opened_block_file(path) if (<int *>fi)[0] & O_ACCMODE == 0 else None
        if file is None:
            file, is_pipe = answers.open_file(
                (<bytes>path).decode("utf-8", "surrogateescape"), (<int *>fi)[0]
            )
            if is_pipe:
                bits = pipe_bits
        for i in range(info_size):
            (<unsigned char *>fi)[i] |= bits[i]
        Py_INCREF(file)
        fh_of(fi)[0] = <uint64_t><size_t><void *>file
        return 0
    except BaseException as e:
        return failed(e)


cdef int fs_read(
    const char *path, char *buf, size_t size, off_t offset, void *fi
) noexcept with gil:
    cdef Py_ssize_t n, start = 0
    cdef bytes data
    cdef OpenBlockFile of_block
    try:
        if not fh_of(fi)[0]:
            return -EBADF
        file = <object><void *><size_t>fh_of(fi)[0]
        if type(file) is OpenBlockFile:
            of_block = <OpenBlockFile>file
            if offset == 0 or of_block.text is None:
                of_block.text = of_block.read_text()
            data, start = of_block.text, offset
            if start >= len(data):
                return 0
        else:
            data = file.read(size, offset)
        n = len(data) - start
        if n > <Py_ssize_t>size:
            n = <Py_ssize_t>size
        memcpy(buf, <const char *>data + start, n)
        return <int>n
    except BaseException as e:
        return failed(e)


cdef int fs_release(const char *path, void *fi) noexcept with gil:
    cdef uint64_t fh = fh_of(fi)[0]
    if fh:
        fh_of(fi)[0] = 0
        Py_DECREF(<object><void *><size_t>fh)
    return 0


cdef int fs_readdir(
    const char *path, void *buf, fill_dir_t fill, off_t offset, void *fi, int flags
) noexcept with gil:
    cdef struct_stat st = blank
    cdef int kind, what = -1
    cdef bytes encoded
    try:
        of_block = block_at(path, &what) is not None
        if of_block:
            valid_zones = attr_at(<bytes>path + b"/valid_zones")
        for name, mode in answers.listing((<bytes>path).decode("utf-8", "surrogateescape")):
            encoded = name.encode("utf-8", "surrogateescape")
            st.st_mode = mode
            # Of directories and links the mode says all, so that nobody has to ask for the rest.
            # Of a block's dozen names hardly any is asked for after its listing: lsmem, which
            # has read the state by then, goes on with this one.
            kind, st.st_size = 0, 0
            if flags & FUSE_READDIR_PLUS:
                if of_block:
                    if name == "valid_zones":
                        st.st_mode, st.st_size = valid_zones.mode, valid_zones.size
                        kind = FUSE_FILL_DIR_PLUS
                elif mode & S_IFMT != S_IFREG:
                    kind = FUSE_FILL_DIR_PLUS
            if fill(buf, encoded, &st, 0, kind):
                break
        return 0
    except BaseException as e:
        return failed(e)


def file_of(uint64_t fh):
    """Return the open file that a number stands for."""
    if not fh:
        raise OSError(EBADF, "not open")
    return <object><void *><size_t>fh
