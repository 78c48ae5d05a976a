"""What the host knows of a mounted tree: nodes by number, their attributes, listings.

The callbacks of ``_fusefs`` share it; a process serves one mount.
"""

cimport cython
from libc.errno cimport EIO, ESTALE
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset, strcmp, strncmp
from posix.stat cimport S_IFMT, S_IFREG

import sys
import traceback
from bisect import bisect_right

from kmm._libfuse cimport fuse_add_direntry_plus, fuse_lowlevel_notify_inval_inode, kmm_entry

cdef enum:
    ROOT = 1
    UNKNOWN_INO = 0xFFFFFFFF  # of a name in a listing that the host gets no number for

# Programs ask for thousands of memory blocks, each of which has these, with the same attributes.
cdef str BLOCKS = "/sys/devices/system/memory"
OF_A_BLOCK = [
    "", "online", "phys_device", "phys_index", "removable", "state", "uevent", "valid_zones"
]
cdef mode_t block_modes[OF_BLOCK]  # 0 until somebody has asked
cdef off_t block_sizes[OF_BLOCK]

answers = tree = lock = unlock = None
changed = {}
nodes, by_path, listed = {}, {}, set()
session = listing = NULL
cdef struct_stat blank
cdef uint64_t last_ino = 0
cdef size_t listing_size = 0


cdef int start(object operations, double keep) except -1:
    """Begin with a root and nothing else."""
    global answers, tree, lock, unlock, keep_names, last_ino, changed
    cdef Node root = Node.__new__(Node)
    answers, tree, keep_names = operations, operations.tree, keep
    changed = operations.changed
    lock, unlock = tree.lock.acquire, tree.lock.release
    memset(&blank, 0, sizeof(blank))
    blank.st_nlink = 1  # of directories, which nobody has counted
    blank.st_uid, blank.st_gid = operations.owner
    blank.st_atime = blank.st_mtime = blank.st_ctime = operations.born
    memset(block_modes, 0, sizeof(block_modes))
    nodes.clear()
    by_path.clear()
    listed.clear()
    block_listings.clear()
    last_ino = 0
    root.path, root.block_id = "/", -1
    told(root)
    return 0


@cython.freelist(64)
@cython.no_gc
cdef class Node:
    """A path that the host knows by a number, whatever is there by now."""

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
    """Fill in what stat(2) tells."""
    set_attr_of_tree(st, node)
    if changed and node.path in changed:
        mode, st.st_uid, st.st_gid = changed[node.path]
        st.st_mode = (st.st_mode & S_IFMT) | <mode_t>mode


cdef void set_attr_of_tree(struct_stat *st, Node node) except *:
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


cdef list names_of(Node node, bint start):
    """Return what is listed of a directory, in an order that goes on for whoever is in it."""
    lock()
    try:
        if node.names is not None and (not start or node.changes == tree.changes):
            return node.names
        block = node.block() if node.what == 0 else None
        if block is not None:
            return answers.block_listing(block)
        names = answers.listing(node.path)
        if node.names is None:
            node.names, node.last_number = names, len(names)
        elif names != node.names:
            renew(node, dict(names))
        node.changes = tree.changes
        return node.names
    finally:
        unlock()


cdef int renew(Node node, dict names) except -1:
    """Put a directory's names of now into its listing: new ones come last."""
    numbers = range(1, node.last_number + 1) if node.numbers is None else node.numbers
    kept, kept_numbers = [], []
    for number, (name, _) in zip(numbers, node.names):
        if name in names:
            kept.append((name, names.pop(name)))
            kept_numbers.append(number)
    for kind in names.items():
        node.last_number += 1
        kept.append(kind)
        kept_numbers.append(node.last_number)
    node.names, node.numbers = kept, kept_numbers
    return 0


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
    cdef Py_ssize_t i, first = offset
    cdef off_t number
    cdef Node known
    names = names_of(node, offset == 0)
    numbers = node.numbers
    listed.add(node.ino)
    if node.block_id >= 0 and offset == 0 and node.names is None and not changed:
        used = fill_block(req, node, names, size)
        if used:
            return used
    room(size)
    if numbers is not None:
        first = bisect_right(numbers, offset)
    for i in range(first, len(names)):
        name, mode = names[i]
        number = i + 1 if numbers is None else numbers[i]
        encoded = name.encode("utf-8", "surrogateescape")
        start_entry(&e, mode)
        known = None
        # Of directories and links the mode says all, so that nobody has to ask for the rest.
        if mode & S_IFMT != S_IFREG and name != "." and name != "..":
            known = child(node, encoded)
            told(known)
            e.ino = e.attr.st_ino = known.ino
        more = fuse_add_direntry_plus(req, listing + used, size - used, encoded, &e, number)
        if more > size - used:
            if known is not None:
                untold(known.ino, 1)
            break
        used += more
    return used


cdef void forget_names() noexcept:
    """Take back from the host what it knows of what has gone, and listings."""
    cdef uint64_t ino
    for path in tree.vanished():
        if changed:
            answers.gone(path)
        node = by_path.get(path)
        if node is not None:
            fuse_lowlevel_notify_inval_inode(session, (<Node>node).ino, 0, 0)
    for number in listed:
        ino = number
        fuse_lowlevel_notify_inval_inode(session, ino, 0, 0)
    listed.clear()
