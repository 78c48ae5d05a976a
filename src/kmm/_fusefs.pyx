"""The callbacks of libfuse's low-level interface, and the loop that serves them.

A process serves one mount.  libfuse is loaded before, with its names open to all (see fusefs), and
what differs between its versions ``install`` is told.

Nearly all the time of a request is what the host takes to wake the server and then the program,
so the loop looks for the next request for a moment before it lets itself be put to sleep.
"""

cimport cython
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport (
    EACCES, EAGAIN, EBADF, EINTR, ENODEV, ENOENT, ENOSYS, ENOTCONN, EPERM
)
from libc.stdint cimport uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset
from posix.fcntl cimport F_GETFL, F_SETFL, O_ACCMODE, O_NONBLOCK, O_RDONLY, fcntl
from posix.stat cimport struct_stat
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.types cimport dev_t, mode_t, off_t

cimport kmm._fuse_names as names
from kmm._fuse_names cimport (
    NAME_MAX, Node, OF_BLOCK, answers, child, failed, fill, forget_names, keep_names, listing, lock,
    node_at, nodes, set_attr, told, tree, unlock, untold
)
from kmm._libfuse cimport *

cdef enum:
    CAP_NO_OPENDIR_SUPPORT = 1 << 24
    FILE_INFO_MAX = 64
    SET_MODE = 1  # FUSE_SET_ATTR_MODE
    SET_UID = 2
    SET_GID = 4
    SLEEP_MS = 1000
    SPIN_NS = 30_000

cdef void *ops[OPS]
cdef unsigned char open_bits[FILE_INFO_MAX]
cdef unsigned char pipe_bits[FILE_INFO_MAX]
cdef Py_ssize_t info_size = 0, fh_at = 0

# Who waits for lines of a pipe: request, pipe, how many bytes; and whether one of them may have to be
# answered, because the machine has changed or somebody is interrupted.
cdef list waiting = []
cdef bint look_again = False

# What shows the files of a memory block, in the order of OF_A_BLOCK.
cdef list block_shows = [None] * OF_BLOCK
cdef bint omit_opendir = False


def install(
    operations,
    dict shows,
    double keep,
    Py_ssize_t fh_offset,
    bytes opened,
    bytes pipe,
):
    """Say who answers.

    :param operations: see fusefs.TreeOperations.
    :param shows: what the files of a memory block show, by name (sysfs_memory.BLOCK_SHOWS).
    :param keep: how long the host may keep names and modes, seconds.
    :param fh_offset: where fuse_file_info keeps ``fh``, bytes; opened, pipe: that structure with
        the bits set that an open file wants, and an open pipe.
    :return: the address of a struct fuse_lowlevel_ops and its size in bytes.
    :raises ValueError: if fuse_file_info is larger than any known one.
    """
    global info_size, fh_at
    cdef int i
    if len(opened) > FILE_INFO_MAX or len(opened) != len(pipe) or fh_offset + 8 > len(opened):
        raise ValueError(f"fuse_file_info of {len(opened)} bytes")
    info_size, fh_at = len(opened), fh_offset
    waiting.clear()
    for i in range(OF_BLOCK):
        block_shows[i] = shows.get((<bytes>names.OF_A_BLOCK[i]).decode())
    memcpy(open_bits, <const char *>opened, info_size)
    memcpy(pipe_bits, <const char *>pipe, info_size)
    names.start(operations, keep)
    memset(ops, 0, sizeof(ops))
    ops[OP_INIT] = <void *>fs_init
    ops[OP_LOOKUP] = <void *>fs_lookup
    ops[OP_FORGET] = <void *>fs_forget
    ops[OP_FORGET_MULTI] = <void *>fs_forget_multi
    ops[OP_GETATTR] = <void *>fs_getattr
    ops[OP_SETATTR] = <void *>fs_setattr
    ops[OP_READLINK] = <void *>fs_readlink
    ops[OP_OPEN] = <void *>fs_open
    ops[OP_READ] = <void *>fs_read
    ops[OP_WRITE] = <void *>fs_write
    ops[OP_RELEASE] = <void *>fs_release
    ops[OP_OPENDIR] = <void *>fs_opendir
    ops[OP_READDIRPLUS] = <void *>fs_readdirplus
    ops[OP_STATFS] = <void *>fs_statfs
    ops[OP_CREATE] = <void *>fs_create
    ops[OP_MKNOD] = <void *>fs_mknod
    ops[OP_MKDIR] = <void *>fs_mkdir
    ops[OP_UNLINK] = ops[OP_RMDIR] = <void *>fs_unlink
    ops[OP_SYMLINK] = <void *>fs_symlink
    ops[OP_RENAME] = <void *>fs_rename
    ops[OP_LINK] = <void *>fs_link
    return <size_t>&ops[0], sizeof(ops)


# -- the loop ----------------------------------------------------------------------------------


def serve(size_t at, bint spin):
    """Take requests until the mount is gone or a signal has come.

    :param at: the address of the struct fuse_session; spin: whether to look for requests for a
        moment before sleeping, which helps where programs have a processor of their own.
    """
    cdef char request[128]  # a struct fuse_buf, and room for what later versions have in it
    cdef pollfd waited
    cdef int got
    cdef long until = 0
    cdef void *session = <void *>at
    names.session = session
    memset(request, 0, sizeof(request))
    waited.fd, waited.events = fuse_session_fd(session), POLLIN
    fcntl(waited.fd, F_SETFL, fcntl(waited.fd, F_GETFL) | O_NONBLOCK)
    while not fuse_session_exited(session):
        got = fuse_session_receive_buf(session, request)
        if got == -EAGAIN:
            if now() >= until:
                with nogil:
                    poll(&waited, 1, SLEEP_MS)
        elif got > 0:
            fuse_session_process_buf(session, request)
            if look_again:
                answer_waiting(0)
            if spin:
                until = now() + SPIN_NS
        elif got != -EINTR:
            break
    answer_waiting(ENOTCONN)
    free((<void **>(request + 16))[0])


cdef inline long now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return t.tv_sec * 1_000_000_000 + t.tv_nsec


# -- names -------------------------------------------------------------------------------------


cdef void fs_init(void *userdata, unsigned *conn) noexcept with gil:
    global omit_opendir
    omit_opendir = conn[5] & CAP_NO_OPENDIR_SUPPORT
    try:
        answers.ready()
    except BaseException as e:
        failed(e)


cdef void fs_lookup(void *req, uint64_t parent, const char *name) noexcept with gil:
    cdef kmm_entry e
    try:
        node = child(node_at(parent), name)
        set_attr(&e.attr, node)
        told(node)
    except BaseException as error:
        fuse_reply_err(req, failed(error))
        return
    e.ino = e.attr.st_ino = node.ino
    e.generation = 0
    e.attr_timeout = e.entry_timeout = keep_names
    if fuse_reply_entry(req, &e):
        untold(e.ino, 1)


cdef void fs_forget(void *req, uint64_t ino, uint64_t times) noexcept with gil:
    untold(ino, times)
    fuse_reply_none(req)


cdef void fs_forget_multi(void *req, size_t count, kmm_forget *which) noexcept with gil:
    cdef size_t i
    for i in range(count):
        untold(which[i].ino, which[i].nlookup)
    fuse_reply_none(req)


cdef void fs_getattr(void *req, uint64_t ino, void *fi) noexcept with gil:
    cdef struct_stat st
    try:
        set_attr(&st, node_at(ino))
    except BaseException as e:
        fuse_reply_err(req, failed(e))
        return
    fuse_reply_attr(req, &st, keep_names)


cdef void fs_setattr(
    void *req, uint64_t ino, struct_stat *st, int which, void *fi
) noexcept with gil:
    """Modes and owners are kept; size, as ``echo >`` sets, and times, as ``touch``, stay."""
    try:
        if which & (SET_MODE | SET_UID | SET_GID):
            answers.change(
                node_at(ino).path,
                st.st_mode & 0o7777 if which & SET_MODE else None,
                st.st_uid if which & SET_UID else None,
                st.st_gid if which & SET_GID else None,
            )
    except BaseException as e:
        fuse_reply_err(req, failed(e))
        return
    fs_getattr(req, ino, fi)


cdef void fs_readlink(void *req, uint64_t ino) noexcept with gil:
    try:
        target = tree.readlink(node_at(ino).path).encode("utf-8", "surrogateescape")
    except BaseException as e:
        fuse_reply_err(req, failed(e))
        return
    fuse_reply_readlink(req, target)


cdef void fs_opendir(void *req, uint64_t ino, void *fi) noexcept with gil:
    # A host that can do without it spares itself two requests a directory.
    if omit_opendir:
        fuse_reply_err(req, ENOSYS)
    else:
        fuse_reply_open(req, fi)


cdef void fs_readdirplus(
    void *req, uint64_t ino, size_t size, off_t offset, void *fi
) noexcept with gil:
    cdef size_t used = 0
    try:
        used = fill(req, node_at(ino), size, offset)
    except BaseException as e:
        fuse_reply_err(req, failed(e))
        return
    fuse_reply_buf(req, listing, used)


# -- open files --------------------------------------------------------------------------------


@cython.freelist(8)
@cython.no_gc
cdef class OpenBlockFile:
    """A file that tells of a memory block, open for reading: its text as of the latest read from
    its start."""

    cdef object block, show
    cdef bytes text

    cdef bytes read_text(self):
        lock()
        try:
            m = tree.m
            if m.memory_blocks.get(self.block.block_id) is not self.block:
                raise OSError(ENODEV, "the block is gone")
            return self.show(m, self.block).encode()
        finally:
            unlock()


cdef class OpenPipe:
    """A file that its reader may have to wait for."""

    cdef object pipe

    def __init__(self, pipe):
        self.pipe = pipe


cdef inline uint64_t *fh_of(void *fi) noexcept nogil:
    return <uint64_t *>(<char *>fi + fh_at)


cdef object opened_block_file(Node node):
    """Return an open file, or None if the tree has to open it."""
    if node.block_id < 0 or block_shows[node.what] is None or names.changed:
        return None
    lock()
    try:
        block = node.block()
        # A saved machine may show a text in the words it was saved in.
        saved = tree.m.saved_texts
        if block is None or saved and node.path in saved:
            return None
        file = <OpenBlockFile>OpenBlockFile.__new__(OpenBlockFile)
        file.block, file.show = block, block_shows[node.what]
        return file
    finally:
        unlock()


cdef void fs_open(void *req, uint64_t ino, void *fi) noexcept with gil:
    cdef Py_ssize_t i
    cdef unsigned char *bits = open_bits
    cdef int flags = (<int *>fi)[0]
    try:
        node = node_at(ino)
        file = opened_block_file(node) if flags & O_ACCMODE == O_RDONLY else None
        if file is None:
            file, is_pipe = answers.open_file(node.path, flags)
            if is_pipe:
                file, bits = OpenPipe(file), pipe_bits
    except BaseException as e:
        fuse_reply_err(req, failed(e))
        return
    for i in range(info_size):
        (<unsigned char *>fi)[i] |= bits[i]
    Py_INCREF(file)
    fh_of(fi)[0] = <uint64_t><size_t><void *>file
    if fuse_reply_open(req, fi):
        Py_DECREF(file)  # who asked has gone, and nothing will be closed


cdef void fs_release(void *req, uint64_t ino, void *fi) noexcept with gil:
    cdef uint64_t fh = fh_of(fi)[0]
    if fh:
        Py_DECREF(<object><void *><size_t>fh)
    fuse_reply_err(req, 0)


cdef object file_of(void *fi):
    if not fh_of(fi)[0]:
        raise OSError(EBADF, "not open")
    return <object><void *><size_t>fh_of(fi)[0]


cdef void fs_read(
    void *req, uint64_t ino, size_t size, off_t offset, void *fi
) noexcept with gil:
    cdef Py_ssize_t n, start = 0
    cdef bytes data
    cdef OpenBlockFile of_block
    try:
        file = file_of(fi)
        if type(file) is OpenBlockFile:
            of_block = <OpenBlockFile>file
            if offset == 0 or of_block.text is None:
                of_block.text = of_block.read_text()
            data, start = of_block.text, offset
        elif type(file) is OpenPipe:
            data = (<OpenPipe>file).pipe.read(size, offset)
            if data is None:
                wait(req, (<OpenPipe>file).pipe, size, (<int *>fi)[0])
                return
        else:
            data = file.read(size, offset)
        n = min(max(len(data) - start, 0), <Py_ssize_t>size)
    except BaseException as e:
        fuse_reply_err(req, failed(e))
        return
    fuse_reply_buf(req, <const char *>data + start if n else NULL, n)


cdef void wait(void *req, object pipe, size_t size, int flags) except *:
    """Have a reader wait until something comes, if that is what its open file is for."""
    if flags & O_NONBLOCK:
        raise OSError(EAGAIN, "nothing has come")
    waiting.append((<size_t>req, pipe, size))
    fuse_req_interrupt_func(req, note_interrupt, NULL)


cdef void note_interrupt(void *req, void *data) noexcept nogil:
    # libfuse holds its locks here: who is interrupted is answered by the loop.
    global look_again
    look_again = True


cdef void answer_waiting(int code) noexcept:
    """Answer the readers of pipes for whom something has come or who wait no longer.

    :param code: with which errno to answer all of them; 0 to let the others wait on.
    """
    global look_again
    cdef void *req
    cdef bytes data
    look_again = False
    asked = waiting[:]
    waiting.clear()
    for entry in asked:
        req = <void *><size_t>entry[0]
        try:
            if code or fuse_req_interrupted(req):
                raise OSError(code or EINTR, "waits no longer")
            data = entry[1].read(entry[2], 0)
        except BaseException as e:
            fuse_reply_err(req, failed(e))
            continue
        if data is None:
            waiting.append(entry)
        else:
            fuse_reply_buf(req, data, len(data))


cdef void fs_write(
    void *req, uint64_t ino, const char *data, size_t size, off_t offset, void *fi
) noexcept with gil:
    cdef size_t written
    global look_again
    try:
        look_again = True
        try:
            written = file_of(fi).write(<bytes>data[:size], offset)
        finally:
            forget_names()
    except BaseException as e:
        fuse_reply_err(req, failed(e))
        return
    fuse_reply_write(req, written)


cdef void fs_statfs(void *req, uint64_t ino) noexcept with gil:
    """Nothing is free, as in sysfs."""
    cdef statvfs_t st
    memset(&st, 0, sizeof(st))
    st.f_bsize = st.f_frsize = answers.block_size
    st.f_namemax = NAME_MAX
    fuse_reply_statfs(req, &st)


# -- what nobody may do ------------------------------------------------------------------------


cdef int no_entry_in(uint64_t parent, int in_sysfs) noexcept:
    """Return why nothing can be made in a directory."""
    found = nodes.get(parent)
    path = (<Node>found).path if found is not None else ""
    return in_sysfs if path == "/sys" or path.startswith("/sys/") else ENOENT


cdef void fs_create(
    void *req, uint64_t parent, const char *name, mode_t mode, void *fi
) noexcept with gil:
    fuse_reply_err(req, no_entry_in(parent, EACCES))


cdef void fs_mknod(
    void *req, uint64_t parent, const char *name, mode_t mode, dev_t dev
) noexcept with gil:
    fuse_reply_err(req, no_entry_in(parent, EPERM))


cdef void fs_mkdir(void *req, uint64_t parent, const char *name, mode_t mode) noexcept with gil:
    fuse_reply_err(req, no_entry_in(parent, EPERM))


cdef void fs_unlink(void *req, uint64_t parent, const char *name) noexcept nogil:
    fuse_reply_err(req, EPERM)


cdef void fs_symlink(
    void *req, const char *target, uint64_t parent, const char *name
) noexcept nogil:
    fuse_reply_err(req, EPERM)


cdef void fs_rename(
    void *req, uint64_t parent, const char *name, uint64_t to, const char *new, unsigned flags
) noexcept nogil:
    fuse_reply_err(req, EPERM)


cdef void fs_link(void *req, uint64_t ino, uint64_t to, const char *name) noexcept nogil:
    fuse_reply_err(req, EPERM)
