# What of libfuse 3's low-level interface is used.  libfuse is not needed to build this: who loads it
# does so with its names open to all (see fusefs).
from libc.stdint cimport uint64_t
from posix.stat cimport struct_stat
from posix.types cimport off_t

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
    LIBFUSE void fuse_req_interrupt_func(void *, void (*)(void *, void *), void *);
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
    void fuse_req_interrupt_func(void *, void (*)(void *, void *) noexcept nogil, void *) nogil
    int fuse_session_exited(void *) nogil
    int fuse_session_fd(void *) nogil
    int fuse_session_receive_buf(void *, void *) nogil
    void fuse_session_process_buf(void *, const void *) nogil


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
