"""A machine's tree as a FUSE file system (fs/fuse, libfuse's low-level interface).

One thread serves: threads that libfuse makes would each be new to Python at every request, and
several of them wait for each other; a read takes three times as long then.  A reader of a pipe
who has to wait is answered when something has come, and keeps nobody from being served.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import stat
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kmm.control import CONTROL, Control, ControlOpenFile, Pipe
from kmm.errors import kernel_error
from kmm.params import PAGE_SIZE
from kmm.sysfs_memory import BLOCK_SHOWS, MEMORY
from kmm.tree import DIRECTORY, Attr, OpenFile, Tree

# Debian installs libfuse 2 beside 3, which mfusepy would take first.
os.environ.setdefault("FUSE_LIBRARY_NAME", "fuse3")

import mfusepy

# What is compiled calls libfuse by name, and so has to find it when it is loaded.
ctypes.CDLL(mfusepy._libfuse_path, ctypes.RTLD_GLOBAL)

from kmm import _fusefs  # noqa: E402

if TYPE_CHECKING:
    from kmm.memory_block import MemoryBlock

#: How long the host may keep names and modes, seconds; what goes is taken back at once.
KEEP_NAMES = 10.0


class _Args(ctypes.Structure):
    """struct fuse_args."""

    _fields_ = (
        ("argc", ctypes.c_int),
        ("argv", ctypes.POINTER(ctypes.c_char_p)),
        ("allocated", ctypes.c_int),
    )


class _Version(ctypes.Structure):
    """struct libfuse_version: what libfuse from 3.17 on asks its callers for."""

    _fields_ = tuple((name, ctypes.c_uint32) for name in ("major", "minor", "hotfix", "padding"))


class TreeOperations:
    """What is asked of a tree; every refusal is the kernel's errno.

    :param ready: called once the mount answers.
    """

    block_size = PAGE_SIZE

    def __init__(self, tree: Tree, control: Control, ready: Callable[[], None]) -> None:
        self.tree, self.control, self.ready = tree, control, ready
        self.born = int(time.time())
        self.owner = os.getuid(), os.getgid()
        #: Permission bits, user and group, by path, where somebody has set them.
        self.changed: dict[str, tuple[int, int, int]] = {}
        self._in_blocks: dict[tuple[tuple[int, ...], bool], list[tuple[str, int]]] = {}

    def attr(self, path: str) -> Attr:
        """stat(2)."""
        return (self.control if path.startswith(CONTROL) else self.tree).attr(path)

    def change(self, path: str, mode: int | None, uid: int | None, gid: int | None) -> None:
        """chmod(2) and chown(2), which last as long as what is there (kernfs_iop_setattr).

        :param mode: permission bits; None, for each of the three, leaves what there is.
        :raises OSError: EPERM for sysctls, whose modes nobody may set, and for .kmm; ENOENT.
        """
        attr = self.attr(path)
        if path.startswith(("/proc/sys/", CONTROL)):
            raise kernel_error(-errno.EPERM, f"{path} has the mode that it has")
        old = self.changed.get(path, (stat.S_IMODE(attr.mode), *self.owner))
        self.changed[path] = (
            old[0] if mode is None else mode,
            old[1] if uid is None else uid,
            old[2] if gid is None else gid,
        )

    def _check_changed(self, path: str, flags: int) -> None:
        """Refuse what the mode that was set lets nobody do, whoever asks (fs/kernfs/file.c)."""
        if path in self.changed and path.startswith("/sys/"):
            mode, access = self.changed[path][0], flags & os.O_ACCMODE
            if (access != os.O_WRONLY and not mode & 0o444) or (
                access != os.O_RDONLY and not mode & 0o222
            ):
                raise kernel_error(-errno.EACCES, f"{path} has mode {mode:o}")

    def gone(self, path: str) -> None:
        """Forget what was set of something that is no more, and of what was in it."""
        for name in [p for p in self.changed if p == path or p.startswith(path + "/")]:
            del self.changed[name]

    def listing(self, path: str) -> list[tuple[str, int]]:
        """The names in a directory, with their kinds; of directories and links the whole mode."""
        names = (self.control if path.startswith(CONTROL) else self.tree).listdir(path)
        own = [(CONTROL[1:], DIRECTORY)] if path == "/" else []
        return [(".", DIRECTORY), ("..", DIRECTORY), *own, *names]

    def block_listing(self, block: MemoryBlock) -> list[tuple[str, int]]:
        """The names in the directory of a memory block, of which there are few kinds."""
        key = block.nodes, block.firmware_node is None
        names = self._in_blocks.get(key)
        if names is None:
            names = self._in_blocks[key] = self.listing(f"{MEMORY}/memory{block.block_id}")
        return names

    def open_file(self, path: str, flags: int) -> tuple[OpenFile | ControlOpenFile | Pipe, bool]:
        """open(2); whether the file is a pipe."""
        if not path.startswith(CONTROL):
            self._check_changed(path, flags)
            return self.tree.open(path, flags), False
        file = self.control.open(path, flags)
        return file, isinstance(file, Pipe)


class Session:
    """A mount, and the loop that serves it.

    :param options: of mount(8).
    :raises RuntimeError: if nothing can be mounted there; libfuse has printed why.
    """

    def __init__(self, mountpoint: str, operations: TreeOperations, options: list[str]) -> None:
        self.lib = mfusepy._libfuse
        # A thread that sleeps is woken late; but on a single processor it must let programs run.
        self.spin = len(os.sched_getaffinity(0)) > 1
        words = [b"kmm", b"-o", ",".join(options).encode()]
        args = _Args(len(words), (ctypes.c_char_p * (len(words) + 1))(*words), 0)
        # Nothing that is read may be kept by the host, so every file is direct_io.
        table, size = _fusefs.install(
            operations,
            BLOCK_SHOWS,
            KEEP_NAMES,
            mfusepy.fuse_file_info.fh.offset,
            _info(direct_io=1),
            _info(direct_io=1, nonseekable=1),
        )
        at = self._new(args, table, size)
        if not at:
            raise RuntimeError("libfuse refuses its arguments")
        self.at = at
        if self._call("fuse_session_mount", mountpoint.encode(errors="surrogateescape")):
            self._call("fuse_session_destroy")
            raise RuntimeError("cannot be mounted")

    def _new(self, args: _Args, table: int, size: int) -> int | None:
        more: tuple[Any, ...] = ()
        if hasattr(self.lib, "fuse_session_new_versioned"):
            new = self.lib.fuse_session_new_versioned
            version = _Version(mfusepy.fuse_version_major, mfusepy.fuse_version_minor)
            more = (ctypes.byref(version),)
        else:
            new = self.lib.fuse_session_new
        new.restype = ctypes.c_void_p
        at: int | None = new(
            ctypes.byref(args), ctypes.c_void_p(table), ctypes.c_size_t(size), *more, None
        )
        return at

    def _call(self, name: str, *args: bytes) -> int:
        function = getattr(self.lib, name)
        function.restype = ctypes.c_int
        result: int = function(ctypes.c_void_p(self.at), *args)
        return result

    def serve(self) -> None:
        """Serve until the mount is gone or a signal has come, and take it away."""
        self._call("fuse_set_signal_handlers")
        try:
            _fusefs.serve(self.at, self.spin)
        finally:
            self._call("fuse_remove_signal_handlers")
            self._call("fuse_session_unmount")
            self._call("fuse_session_destroy")


def _info(**bits: int) -> bytes:
    """Return the fuse_file_info of an open file with these bits set."""
    info = mfusepy.fuse_file_info()
    for name, value in bits.items():
        setattr(info, name, value)
    return bytes(info)


def run(mountpoint: str, operations: TreeOperations) -> None:
    """Mount operations and serve them until they are unmounted or a signal comes.

    :raises RuntimeError: if nothing can be mounted there; libfuse has printed why.
    """
    options = ["fsname=kmm", "subtype=kmm", "default_permissions", "nosuid", "nodev"]
    if os.getuid() == 0:
        options.append("allow_other")
    session = Session(mountpoint, operations, options)
    old = signal.signal(signal.SIGINT, signal.SIG_DFL)  # libfuse takes what nobody has taken
    try:
        session.serve()
    finally:
        signal.signal(signal.SIGINT, old)
