"""A machine's tree as a FUSE file system (fs/fuse, libfuse's high-level interface).

One thread serves: threads that libfuse makes would each be new to Python at every request, and
several of them wait for each other; a read takes three times as long then.  A reader of a pipe
who has to wait keeps its thread, and another one goes on serving meanwhile.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, Thread
from typing import Any

from kmm import _fusefs
from kmm.control import CONTROL, Control, ControlOpenFile, Pipe
from kmm.errors import KernelError, kernel_error
from kmm.params import PAGE_SIZE
from kmm.sysfs_memory import BLOCK_SHOWS
from kmm.tree import DIRECTORY, Attr, OpenFile, Tree

# Debian installs libfuse 2 beside 3, which mfusepy would take first.
os.environ.setdefault("FUSE_LIBRARY_NAME", "fuse3")

import mfusepy

#: How long the host may keep names and modes, seconds; what goes is taken back at once.
KEEP_NAMES = 10.0
NAME_MAX = 255
#: What libfuse calls FUSE_CAP_READDIRPLUS_AUTO.
_READDIRPLUS_AUTO = 1 << 14
#: How long a thread that serves has to see that the mount is gone, seconds.
_PATIENCE = 2.0


def _declare(lib: Any) -> Any:
    """Declare what is called of libfuse beside what mfusepy calls."""
    for name, result, arguments in (
        ("fuse_get_session", ctypes.c_void_p, [ctypes.c_void_p]),
        ("fuse_session_exited", ctypes.c_int, [ctypes.c_void_p]),
        ("fuse_invalidate_path", ctypes.c_int, [ctypes.c_void_p, ctypes.c_char_p]),
        ("fuse_session_receive_buf", ctypes.c_int, [ctypes.c_void_p, ctypes.c_void_p]),
        ("fuse_session_process_buf", None, [ctypes.c_void_p, ctypes.c_void_p]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


class TreeOperations(mfusepy.Operations):  # type: ignore[misc]
    """What libfuse asks of a tree; every refusal is the kernel's errno.

    :param ready: called once the mount answers.
    """

    use_ns = True

    def __init__(self, tree: Tree, control: Control, ready: Callable[[], None]) -> None:
        self.tree, self.control, self.ready = tree, control, ready
        self.born = int(time.time())
        self.owner = os.getuid(), os.getgid()
        self.lib = _declare(mfusepy._libfuse)
        self.fuse: Any = None
        self.session: Any = None
        self.receivers, self.counting = 1, Lock()
        self.threads: list[Thread] = []

    def init_with_config(self, conn: Any, config: Any) -> None:
        """The mount answers."""
        # A listing brings what is known of every name, and not of its first names alone: to ask
        # for thousands of blocks one by one takes longer.
        conn.want &= ~_READDIRPLUS_AUTO
        self.fuse = self.lib.fuse_get_context().contents.fuse
        self.session = self.lib.fuse_get_session(self.fuse)
        self.ready()

    def destroy(self, path: str) -> None:
        """The mount is gone: what still waits for its requests sees that."""
        for thread in self.threads:
            thread.join(_PATIENCE)
            if thread.is_alive():
                os._exit(0)  # libfuse is about to free what the thread looks at

    @contextmanager
    def _others_serve(self) -> Iterator[None]:
        """For somebody who has to wait: let another thread take the requests meanwhile."""
        with self.counting:
            self.receivers -= 1
            alone = self.receivers < 1
            self.receivers += alone
        if alone:
            self.threads = [t for t in self.threads if t.is_alive()]
            thread = Thread(target=self._serve, daemon=True)
            self.threads.append(thread)
            thread.start()
        try:
            yield
        finally:
            with self.counting:
                self.receivers += 1

    def _serve(self) -> None:
        """Take requests until another thread does so as well."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        request = mfusepy.fuse_buf()
        at = ctypes.addressof(request)
        while not self.lib.fuse_session_exited(self.session):
            result = self.lib.fuse_session_receive_buf(self.session, at)
            if result == -errno.EINTR:
                continue
            if result <= 0:
                break
            self.lib.fuse_session_process_buf(self.session, at)
            with self.counting:
                if self.receivers > 1:
                    break
        with self.counting:
            self.receivers -= 1
        libc = ctypes.CDLL(None)
        libc.free.argtypes = [ctypes.c_void_p]
        libc.free(request.mem)

    # -- what _fusefs asks for ----------------------------------------------------------

    def attr(self, path: str) -> Attr:
        """stat(2)."""
        return (self.control if path.startswith(CONTROL) else self.tree).attr(path)

    def listing(self, path: str) -> list[tuple[str, int]]:
        """The names in a directory, with their kinds; of directories and links the whole mode."""
        names = (self.control if path.startswith(CONTROL) else self.tree).listdir(path)
        own = [(CONTROL[1:], DIRECTORY)] if path == "/" else []
        return [(".", DIRECTORY), ("..", DIRECTORY), *own, *names]

    def open_file(self, path: str, flags: int) -> tuple[OpenFile | ControlOpenFile | Pipe, bool]:
        """open(2); whether the file is a pipe."""
        if not path.startswith(CONTROL):
            return self.tree.open(path, flags), False
        file = self.control.open(path, flags)
        if isinstance(file, Pipe):
            file.interrupted, file.waiting = self._interrupted, self._others_serve
            return file, True
        return file, False

    # -- what mfusepy asks for ----------------------------------------------------------

    def getattr(self, path: str, fh: Any = None) -> dict[str, int]:
        """Asked for by _fusefs, as open, read, release and readdir are."""
        raise kernel_error(-errno.ENOSYS, path)

    open = read = release = readdir = getattr

    def readlink(self, path: str) -> str:
        """readlink(2)."""
        return self.tree.readlink(path)

    def statfs(self, path: str) -> dict[str, int]:
        """statvfs(3): nothing is free, as in sysfs."""
        return {"f_bsize": PAGE_SIZE, "f_frsize": PAGE_SIZE, "f_namemax": NAME_MAX}

    def _interrupted(self) -> int:
        if self.lib.fuse_session_exited(self.session):
            return errno.ENOTCONN
        return errno.EINTR if self.lib.fuse_interrupted() else 0

    def write(self, path: str, data: bytes, offset: int, fi: Any) -> int:
        """write(2): one store."""
        try:
            written: int = _fusefs.file_of(fi.fh).write(data, offset)
            return written
        except KernelError:
            raise
        except Exception:
            # A fault of kmm's; the writer sees an error that no file gives for another reason.
            traceback.print_exc(file=sys.stderr)
            raise kernel_error(-errno.EIO, "kmm failed") from None
        finally:
            self._forget_names()

    def _forget_names(self) -> None:
        for path in self.tree.vanished():
            self.lib.fuse_invalidate_path(self.fuse, path.encode())

    # -- what files of sysfs and proc let pass, or refuse -------------------------------

    def truncate(self, path: str, length: int, fh: Any = None) -> int:
        """truncate(2), as ``echo >`` does first: changes nothing."""
        return 0

    def chmod(self, path: str, mode: int) -> int:
        """chmod(2): modes are the kernel's."""
        raise kernel_error(-errno.EPERM, path)

    def chown(self, path: str, uid: int, gid: int) -> int:
        """chown(2)."""
        raise kernel_error(-errno.EPERM, path)

    def utimens(self, path: str, times: Any = None) -> int:
        """utimensat(2), as ``touch`` does: changes nothing."""
        return 0

    def create(self, path: str, mode: int, fi: Any) -> int:
        """open(2) of what is not there: nobody makes files here."""
        code = errno.EACCES if path.startswith("/sys/") else errno.ENOENT
        raise kernel_error(-code, f"no file {path}, and none can be made")

    def mkdir(self, path: str, mode: int) -> int:
        """mkdir(2)."""
        code = errno.EPERM if path.startswith("/sys/") else errno.ENOENT
        raise kernel_error(-code, path)

    def mknod(self, path: str, mode: int, dev: int) -> int:
        """mknod(2)."""
        return self.mkdir(path, mode)

    def unlink(self, path: str) -> int:
        """unlink(2)."""
        raise kernel_error(-errno.EPERM, path)

    def rmdir(self, path: str) -> int:
        """rmdir(2)."""
        raise kernel_error(-errno.EPERM, path)

    def rename(self, old: str, new: str) -> int:
        """rename(2)."""
        raise kernel_error(-errno.EPERM, old)

    def link(self, target: str, source: str) -> int:
        """link(2)."""
        raise kernel_error(-errno.EPERM, target)

    def symlink(self, target: str, source: str) -> int:
        """symlink(2)."""
        raise kernel_error(-errno.EPERM, target)


def _info(**bits: int) -> bytes:
    """Return the fuse_file_info of an open file with these bits set."""
    info = mfusepy.fuse_file_info()
    for name, value in bits.items():
        setattr(info, name, value)
    return bytes(info)


def run(mountpoint: str, operations: TreeOperations, **options: Any) -> None:
    """Mount operations and serve them until they are unmounted or a signal comes.

    :raises RuntimeError: with libfuse's number, if it could not or if a signal ended it.
    """
    # Nothing that is read may be kept by the host, so every file is direct_io.
    addresses = _fusefs.install(
        operations,
        BLOCK_SHOWS,
        mfusepy.fuse_file_info.fh.offset,
        _info(direct_io=1),
        _info(direct_io=1, nonseekable=1),
    )
    types = {name: kind for name, kind, *_ in mfusepy.fuse_operations._fields_}
    main = mfusepy.fuse_main_real

    def main_real(argc: int, argv: Any, table: Any, size: int, data: Any) -> int:
        for name, address in addresses.items():
            setattr(table.contents, name, types[name](address))
        result: int = main(argc, argv, table, size, data)
        return result

    # mfusepy hands its table of callbacks to this function alone.
    mfusepy.fuse_main_real = main_real
    try:
        mfusepy.FUSE(
            operations,
            mountpoint,
            foreground=True,
            raw_fi=True,
            nothreads=True,
            fsname="kmm",
            subtype="kmm",
            default_permissions=True,
            nosuid=True,
            nodev=True,
            entry_timeout=KEEP_NAMES,
            attr_timeout=KEEP_NAMES,
            **({"allow_other": True} if os.getuid() == 0 else {}),
            **options,
        )
    finally:
        mfusepy.fuse_main_real = main
