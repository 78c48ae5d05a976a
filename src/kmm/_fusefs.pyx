"""The callbacks of libfuse that programs cause most, without the detour through ctypes.

A process serves one mount, so what answers is kept here.  Nothing of libfuse is needed to build
this: where its structures differ between versions, ``install`` is told.
"""

from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport EBADF, EIO
from libc.stdint cimport uint64_t
from libc.string cimport memcpy, memset
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

cdef object answers = None
cdef struct_stat blank
cdef unsigned char open_bits[FILE_INFO_MAX]
cdef unsigned char pipe_bits[FILE_INFO_MAX]
cdef Py_ssize_t info_size = 0, fh_at = 0


def install(operations, Py_ssize_t fh_offset, bytes opened, bytes pipe):
    """Say who answers.

    :param operations: has attr, listing and open_file (see fusefs.TreeOperations).
    :param fh_offset: where fuse_file_info keeps ``fh``, bytes; opened, pipe: that structure with
        the bits set that an open file wants, and an open pipe.
    :return: the addresses of the callbacks by their names in fuse_operations.
    """
    global answers, info_size, fh_at
    if len(opened) > FILE_INFO_MAX or len(opened) != len(pipe) or fh_offset + 8 > len(opened):
        raise ValueError(f"fuse_file_info of {len(opened)} bytes")
    answers, info_size, fh_at = operations, len(opened), fh_offset
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


cdef int fs_getattr(const char *path, struct_stat *st, void *fi) noexcept with gil:
    try:
        attr = answers.attr((<bytes>path).decode("utf-8", "surrogateescape"))
        st[0] = blank
        st.st_mode, st.st_size = attr.mode, attr.size
        return 0
    except BaseException as e:
        return failed(e)


cdef int fs_open(const char *path, void *fi) noexcept with gil:
    cdef Py_ssize_t i
    cdef unsigned char *bits = open_bits
    try:
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
    cdef Py_ssize_t n
    cdef bytes data
    try:
        if not fh_of(fi)[0]:
            return -EBADF
        data = (<object><void *><size_t>fh_of(fi)[0]).read(size, offset)
        n = len(data)
        if n > <Py_ssize_t>size:
            n = <Py_ssize_t>size
        memcpy(buf, <const char *>data, n)
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
    cdef int kind
    cdef bytes encoded
    try:
        for name, mode in answers.listing((<bytes>path).decode("utf-8", "surrogateescape")):
            encoded = name.encode("utf-8", "surrogateescape")
            st.st_mode = mode
            # Of directories and links the mode says all, so that nobody has to ask for the rest.
            kind = 0
            if flags & FUSE_READDIR_PLUS and mode & S_IFMT != S_IFREG:
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
