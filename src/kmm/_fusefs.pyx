"""The callbacks of libfuse's low-level interface, and the loop that serves them.

A process serves one mount, so what answers is kept here.  libfuse is not needed to build this: it
is loaded before, with its names open to all (see fusefs), and what differs between its versions
``install`` is told.

Nearly all the time of a request is what the host takes to wake the server and then the program,
so the loop looks for the next request for a moment before it lets itself be put to sleep.
"""

cimport cython
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport (
    EACCES, EAGAIN, EBADF, EINTR, EIO, ENODEV, ENOENT, ENOSYS, ENOTCONN, EPERM, ESTALE
)
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset, strcmp, strlen, strncmp
from posix.fcntl cimport F_GETFL, F_SETFL, O_ACCMODE, O_NONBLOCK, O_RDONLY, fcntl
from posix.stat cimport S_IFMT, S_IFREG, struct_stat
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.types cimport dev_t, mode_t, off_t

import sys
import traceback

cdef extern from *:
    """
    #include <poll.h>
    #include <stdint.h>
    #include <sys/stat.h>
    #include <sys/statvfs.h>

    /* What of libfuse 3's ABI is used; "weak" lets this be loaded where libfuse is not. */
    #define LIBFUSE extern __attribute__((weak))
    struct kmm_entry { uint64_t ino, generation; struct stat attr; double attr_timeout, entry_timeout; };
    struct kmm_forget { uint64_t ino, nlookup; };
    LIBFUSE int fuse_reply_err(void *, int);
    LIBFUSE void fuse_reply_none(void *);
    LIBFUSE int fuse_reply_entry(void *, const struct kmm_entry *);
    LIBFUSE int fuse_reply_attr(void *, const struct stat *, double);
    LIBFUSE int fuse_reply_readlink(void *, const char *);
    LIBFUSE int fuse_reply_open(void *, const void *);
    LIBFUSE int fuse_reply_write(void *, size_t);
    LIBFUSE int fuse_reply_buf(void *, const char *, size_t);
    LIBFUSE int fuse_reply_statfs(void *, const struct statvfs *);
    LIBFUSE size_t fuse_add_direntry_plus(
        void *, char *, size_t, const char *, const struct kmm_entry *, off_t);
    LIBFUSE int fuse_lowlevel_notify_inval_inode(void *, uint64_t, off_t, off_t);
    LIBFUSE int fuse_req_interrupted(void *);
    LIBFUSE int fuse_session_exited(void *);
    LIBFUSE int fuse_session_fd(void *);
    LIBFUSE int fuse_session_receive_buf(void *, void *);
    LIBFUSE void fuse_session_process_buf(void *, const void *);
    """
    struct kmm_entry:
        uint64_t ino
        uint64_t generation
        struct_stat attr
        double attr_timeout
        double entry_timeout
    struct kmm_forget:
        uint64_t ino
        uint64_t nlookup
    struct statvfs_t "statvfs":
        unsigned long f_bsize
        unsigned long f_frsize
        unsigned long f_namemax
    struct pollfd:
        int fd
        short events
    const short POLLIN
    int poll(pollfd *, unsigned long, int) nogil
    int fuse_reply_err(void *, int) nogil
    void fuse_reply_none(void *) nogil
    int fuse_reply_entry(void *, const kmm_entry *) nogil
    int fuse_reply_attr(void *, const struct_stat *, double) nogil
    int fuse_reply_readlink(void *, const char *) nogil
    int fuse_reply_open(void *, const void *) nogil
    int fuse_reply_write(void *, size_t) nogil
    int fuse_reply_buf(void *, const char *, size_t) nogil
    int fuse_reply_statfs(void *, const statvfs_t *) nogil
    size_t fuse_add_direntry_plus(
        void *, char *, size_t, const char *, const kmm_entry *, off_t) nogil
    int fuse_lowlevel_notify_inval_inode(void *, uint64_t, off_t, off_t) nogil
    int fuse_req_interrupted(void *) nogil
    int fuse_session_exited(void *) nogil
    int fuse_session_fd(void *) nogil
    int fuse_session_receive_buf(void *, void *) nogil
    void fuse_session_process_buf(void *, const void *) nogil

cdef enum:
    CAP_NO_OPENDIR_SUPPORT = 1 << 24
    FILE_INFO_MAX = 64
    NAME_MAX = 255
    OF_BLOCK = 8
    ROOT = 1
    SET_MODE_OR_OWNER = 7  # FUSE_SET_ATTR_MODE, _UID, _GID
    UNKNOWN_INO = 0xFFFFFFFF  # of a name in a listing that the host gets no number for
    SLEEP_MS = 1000
    SPIN_NS = 30_000

# The places of callbacks in struct fuse_lowlevel_ops.
cdef enum:
    OP_INIT = 0
    OP_LOOKUP = 2
    OP_FORGET = 3
    OP_GETATTR = 4
    OP_SETATTR = 5
    OP_READLINK = 6
    OP_MKNOD = 7
    OP_MKDIR = 8
    OP_UNLINK = 9
    OP_RMDIR = 10
    OP_SYMLINK = 11
    OP_RENAME = 12
    OP_LINK = 13
    OP_OPEN = 14
    OP_READ = 15
    OP_WRITE = 16
    OP_RELEASE = 18
    OP_OPENDIR = 20
    OP_STATFS = 24
    OP_CREATE = 30
    OP_FORGET_MULTI = 38
    OP_READDIRPLUS = 41
    OPS = 42

cdef object answers = None, tree = None, lock = None, unlock = None
cdef void *session = NULL
cdef double keep_names = 0
cdef void *ops[OPS]
cdef struct_stat blank
cdef unsigned char open_bits[FILE_INFO_MAX]
cdef unsigned char pipe_bits[FILE_INFO_MAX]
cdef Py_ssize_t info_size = 0, fh_at = 0
# Threads that take requests; one that has another one beside it ends.
cdef int receivers = 0

# Programs ask for thousands of memory blocks, each of which has these, with the same attributes.
cdef str BLOCKS = "/sys/devices/system/memory"
cdef const char **OF_A_BLOCK = [
    "", "online", "phys_device", "phys_index", "removable", "state", "uevent", "valid_zones"
]
cdef mode_t block_modes[OF_BLOCK]  # 0 until somebody has asked
cdef off_t block_sizes[OF_BLOCK]
cdef list block_shows = [None] * OF_BLOCK


@cython.freelist(64)
@cython.no_gc
cdef class Node:
    """A path that the host knows by a number, whatever is there by now."""

    cdef uint64_t ino, nlookup
    cdef str path
    cdef long block_id  # of the memory block that it belongs to, or -1
    cdef int what  # which of OF_A_BLOCK
    # A listing that did not fit in one answer, with None for what has gone since, and of when.
    cdef list names
    cdef object changes

    cdef object block(self):
        """Return the memory block, or None; called with the tree's lock held."""
        return None if self.block_id < 0 else tree.m.memory_blocks.get(self.block_id)


cdef Node new_node(Node parent, const char *name, str path):
    """Return a node that has no number yet, of a name in a directory."""
    cdef Node node = Node.__new__(Node)
    cdef int i
    node.path, node.block_id = path, -1
    if parent.block_id >= 0 and parent.what == 0:
        for i in range(1, OF_BLOCK):
            if not strcmp(name, OF_A_BLOCK[i]):
                node.block_id, node.what = parent.block_id, i
    elif parent.path == BLOCKS and not strncmp(name, "memory", 6):
        node.block_id = number_in(name + 6)
    return node


cdef long number_in(const char *digits) noexcept:
    """Return the number that a block's name has, -1 if no block has such a name."""
    cdef long number = 0
    cdef int i = 0
    while c"0" <= digits[i] <= c"9" and i < 9:
        number = number * 10 + digits[i] - c"0"
        i += 1
    return number if i and not digits[i] and (i == 1 or digits[0] != c"0") else -1


cdef dict nodes = {}  # by number
cdef dict by_path = {}
cdef uint64_t last_ino = 0
cdef set listed = set()  # the numbers of directories whose listings the host may have kept


cdef char *listing = NULL  # where the answer to a listing is put together
cdef size_t listing_size = 0
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
    global answers, tree, lock, unlock, info_size, fh_at, keep_names, last_ino, receivers
    cdef int i
    if len(opened) > FILE_INFO_MAX or len(opened) != len(pipe) or fh_offset + 8 > len(opened):
        raise ValueError(f"fuse_file_info of {len(opened)} bytes")
    answers, info_size, fh_at, keep_names = operations, len(opened), fh_offset, keep
    tree = operations.tree
    lock, unlock = tree.lock.acquire, tree.lock.release
    for i in range(OF_BLOCK):
        block_modes[i] = block_sizes[i] = 0
        block_shows[i] = shows.get((<bytes>OF_A_BLOCK[i]).decode())
    memcpy(open_bits, <const char *>opened, info_size)
    memcpy(pipe_bits, <const char *>pipe, info_size)
    memset(&blank, 0, sizeof(blank))
    blank.st_nlink = 1  # of directories, which nobody has counted
    blank.st_uid, blank.st_gid = operations.owner
    blank.st_atime = blank.st_mtime = blank.st_ctime = operations.born
    nodes.clear()
    by_path.clear()
    listed.clear()
    block_listings.clear()
    last_ino, receivers = 0, 0
    cdef Node root = Node.__new__(Node)
    root.path, root.block_id = "/", -1
    told(root)
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


def serve(size_t at, bint spin, bint last):
    """Take requests until the mount is gone or a signal has come.

    :param at: the address of the struct fuse_session; spin: whether to look for requests for a
        moment before sleeping, which helps where programs have a processor of their own.
    :param last: whether to stay when another thread takes requests as well.
    """
    global session, receivers
    cdef char request[128]  # a struct fuse_buf, and room for what later versions have in it
    cdef pollfd waited
    cdef int got
    cdef long until = 0
    session = <void *>at
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
            if receivers > 1 and not last:
                break
            if spin:
                until = now() + SPIN_NS
        elif got != -EINTR:
            break
    receivers -= 1
    free((<void **>(request + 16))[0])


def step_aside():
    """Stop counting the calling thread, which is going to wait, among those that take requests.

    :return: whether it was the only one: somebody else has to call ``serve``, and is counted.
    """
    global receivers
    receivers -= 1
    if receivers < 1:
        receivers = 1
        return True
    return False


def come_back():
    """Count the calling thread again."""
    global receivers
    receivers += 1


cdef inline long now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return t.tv_sec * 1_000_000_000 + t.tv_nsec


def interrupted(size_t request):
    """Return the errno that who waits on behalf of a request has to return with, or 0."""
    if fuse_session_exited(session):
        return ENOTCONN
    return EINTR if fuse_req_interrupted(<void *>request) else 0


# -- names -------------------------------------------------------------------------------------


cdef int failed(object error) noexcept:
    """Return the errno to reply; what is no refusal is a fault of kmm's."""
    if isinstance(error, OSError) and error.errno:
        return <int>error.errno
    traceback.print_exception(error, file=sys.stderr)
    return EIO


cdef void told(Node node) noexcept:
    """The host has been told of a node once more."""
    global last_ino
    if not node.ino:
        last_ino += 1
        node.ino = last_ino
        nodes[node.ino] = by_path[node.path] = node
    node.nlookup += 1


cdef void untold(uint64_t ino, uint64_t times) noexcept:
    """The host has forgotten that it was told of a node."""
    found = nodes.get(ino)
    if found is None:
        return
    node = <Node>found
    node.nlookup -= min(times, node.nlookup)
    if not node.nlookup:
        del nodes[ino], by_path[node.path]
        listed.discard(ino)


cdef Node node_at(uint64_t ino):
    found = nodes.get(ino)
    if found is None:
        raise OSError(ESTALE, f"no node {ino}")
    return <Node>found


cdef Node child(Node parent, const char *name):
    """Return the node of a name in a directory; a new one has no number yet."""
    cdef str text = (<bytes>name).decode("utf-8", "surrogateescape")
    cdef str path = parent.path + "/" + text if parent.ino != ROOT else "/" + text
    node = by_path.get(path)
    return new_node(parent, name, path) if node is None else <Node>node


cdef void set_attr(struct_stat *st, Node node) except *:
    st[0] = blank
    st.st_ino = node.ino
    lock()
    try:
        if node.block() is not None and block_modes[node.what]:
            st.st_mode, st.st_size = block_modes[node.what], block_sizes[node.what]
            return
        attr = answers.attr(node.path)
        st.st_mode, st.st_size = attr.mode, attr.size
        if node.block() is not None:
            block_modes[node.what], block_sizes[node.what] = attr.mode, attr.size
    finally:
        unlock()


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
    """Modes and owners are the kernel's; size, as ``echo >`` sets, and times, as ``touch``, stay."""
    if which & SET_MODE_OR_OWNER:
        fuse_reply_err(req, EPERM)
    else:
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


cdef list names_of(Node node, bint start):
    """Return what is listed of a directory, in an order that goes on for whoever is in it.

    None stands for a name that has gone.
    """
    lock()
    try:
        if node.names is not None and (not start or node.changes == tree.changes):
            return node.names
        block = node.block() if node.what == 0 else None
        names = answers.listing(node.path) if block is None else answers.block_listing(block)
        if node.names is not None:
            now_there, known = set(names), set(node.names)
            kept = [name if name in now_there else None for name in node.names]
            if kept.count(None) < len(names):
                names = kept + [name for name in names if name not in known]
            node.names, node.changes = names, tree.changes
        return names
    finally:
        unlock()


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


cdef bint room(size_t size) except False:
    """See to it that ``listing`` has room for so many bytes."""
    global listing, listing_size
    if size > listing_size:
        free(listing)
        listing, listing_size = <char *>malloc(size), size
        if listing == NULL:
            listing_size = 0
            raise MemoryError
    return True


cdef class BlockListing:
    """The listing of a memory block's directory as blocks of its kind all have it, but for the
    number of valid_zones.

    Of a block's dozen names hardly any is asked for after its listing: lsmem, which has read the
    state by then, goes on with valid_zones, so the host is told of that one.
    """

    cdef bytes names
    cdef Py_ssize_t at, place  # of valid_zones: bytes, and the number of the name


cdef dict block_listings = {}  # by the identity of a list of names


cdef void start_entry(kmm_entry *e, mode_t mode) noexcept:
    e.generation, e.ino, e.attr_timeout, e.entry_timeout = 0, 0, keep_names, keep_names
    e.attr = blank
    e.attr.st_mode, e.attr.st_ino = mode, UNKNOWN_INO


cdef BlockListing block_listing(void *req, list names):
    """Put the listing of a block's directory together."""
    cdef kmm_entry e
    cdef size_t used = 0
    cdef BlockListing made = BlockListing.__new__(BlockListing)
    cdef Py_ssize_t i
    room(len(names) * (sizeof(kmm_entry) + 2 * NAME_MAX))
    made.at = -1
    for i, (name, mode) in enumerate(names):
        start_entry(&e, mode)
        if name == "valid_zones":
            made.at, made.place = used, i + 1
        used += fuse_add_direntry_plus(
            req, listing + used, listing_size - used, name.encode(), &e, i + 1
        )
    made.names = listing[:used]
    block_listings[id(names)] = made
    return made


cdef size_t fill_block(void *req, Node node, list names, size_t size) except? 0:
    """Write the listing of a block's directory, or nothing if it does not fit at once."""
    cdef kmm_entry e
    found = block_listings.get(id(names))
    cdef BlockListing of_block = block_listing(req, names) if found is None else found
    cdef size_t used = len(of_block.names)
    cdef Node known
    if used > size:
        return 0
    room(size)
    memcpy(listing, <const char *>of_block.names, used)
    if of_block.at >= 0:
        known = child(node, "valid_zones")
        start_entry(&e, 0)
        set_attr(&e.attr, known)
        told(known)
        e.ino = e.attr.st_ino = known.ino
        fuse_add_direntry_plus(
            req, listing + of_block.at, used - of_block.at, "valid_zones", &e, of_block.place
        )
    return used


cdef size_t fill(void *req, Node node, size_t size, off_t offset) except? 0:
    """Write as many names as fit into ``listing``; return how many bytes they take."""
    cdef kmm_entry e
    cdef size_t used = 0, more
    cdef Py_ssize_t i
    cdef Node known
    names = names_of(node, offset == 0)
    listed.add(node.ino)
    if node.block_id >= 0 and offset == 0 and node.names is None:
        used = fill_block(req, node, names, size)
        if used:
            return used
    room(size)
    for i in range(offset, len(names)):
        if names[i] is None:
            continue
        name, mode = names[i]
        encoded = name.encode("utf-8", "surrogateescape")
        start_entry(&e, mode)
        known = None
        # Of directories and links the mode says all, so that nobody has to ask for the rest.
        if mode & S_IFMT != S_IFREG and name != "." and name != "..":
            known = child(node, encoded)
            told(known)
            e.ino = e.attr.st_ino = known.ino
        more = fuse_add_direntry_plus(req, listing + used, size - used, encoded, &e, i + 1)
        if more > size - used:
            if known is not None:
                untold(known.ino, 1)
            if offset == 0 and node.names is None:
                node.names, node.changes = names, tree.changes
            break
        used += more
    return used


cdef void forget_names() noexcept:
    """Take back from the host what it knows of what has gone, and listings."""
    cdef uint64_t ino
    for path in tree.vanished():
        node = by_path.get(path)
        if node is not None:
            fuse_lowlevel_notify_inval_inode(session, (<Node>node).ino, 0, 0)
    for number in listed:
        ino = number
        fuse_lowlevel_notify_inval_inode(session, ino, 0, 0)
    listed.clear()


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
    if node.block_id < 0 or block_shows[node.what] is None:
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
            data = answers.read_pipe((<OpenPipe>file).pipe, size, offset, <size_t>req)
        else:
            data = file.read(size, offset)
        n = min(max(len(data) - start, 0), <Py_ssize_t>size)
    except BaseException as e:
        fuse_reply_err(req, failed(e))
        return
    fuse_reply_buf(req, <const char *>data + start if n else NULL, n)


cdef void fs_write(
    void *req, uint64_t ino, const char *data, size_t size, off_t offset, void *fi
) noexcept with gil:
    cdef size_t written
    try:
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
