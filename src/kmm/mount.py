"""Mounting a machine: which one, the process that serves it, and a handle on it for tests."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import json
import os
import select
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmm.control import CONTROL, Control
from kmm.errors import KernelError
from kmm.machine import Machine
from kmm.machine_source import player_of
from kmm.params import MachineConfig
from kmm.scenario import Player
from kmm.tree import Tree

FUSE_DEVICE = "/dev/fuse"
_PR_SET_PDEATHSIG = 1
#: How long a server has to end, seconds.
_PATIENCE = 5


class MountError(Exception):
    """A machine could not be mounted, or its server has died; says why in one sentence."""


# -- before anything is mounted -------------------------------------------------------------


def check_mountpoint(path: str) -> None:
    """Check that a machine can be mounted on a directory.

    :raises MountError: saying in one sentence why not.
    """
    try:
        there = os.stat(path)
    except OSError as e:
        if e.errno == errno.ENOTCONN:
            raise _dead(path) from None
        raise MountError(f"{path}: {e.strerror}") from None
    if not stat.S_ISDIR(there.st_mode):
        raise MountError(f"{path}: not a directory")
    kind = mounts().get(os.path.realpath(path))
    if kind == "fuse.kmm" and not answers(path):
        raise _dead(path)
    if kind is not None:
        what = "a machine" if kind == "fuse.kmm" else f"a file system ({kind})"
        raise MountError(f"{path}: {what} is mounted there already; umount {path} ends it")
    with contextlib.suppress(OSError):  # what cannot be read, libfuse judges
        if os.listdir(path):
            raise MountError(f"{path}: not empty; what is in there would be out of sight")


def _dead(path: str) -> MountError:
    return MountError(
        f"{path}: a mount whose server has died is there; fusermount3 -u {path} ends it"
    )


def answers(path: str) -> bool:
    """Whether the server of a machine that is mounted on a directory lives.

    Names and modes may be the host's memory of it; what a file says is not.
    """
    try:
        Path(f"{path}{CONTROL}/status").read_bytes()
    except OSError as e:
        return e.errno not in (errno.ENOTCONN, errno.ECONNABORTED)
    return True


def check_fuse() -> None:
    """Check that this host has FUSE and lets us use it.

    :raises MountError: saying in one sentence what is missing.
    """
    try:
        os.close(os.open(FUSE_DEVICE, os.O_RDWR))
    except FileNotFoundError:
        raise MountError(
            f"{FUSE_DEVICE}: this host has no FUSE; modprobe fuse, or --device /dev/fuse of a "
            "container, brings it"
        ) from None
    except OSError as e:
        raise MountError(f"{FUSE_DEVICE}: {e.strerror}; its group, or root, may use it") from None
    try:
        import kmm.fusefs  # noqa: F401
    except ImportError as e:
        raise MountError(f"mounting needs mfusepy; install kmm[mount] ({e})") from None
    except OSError as e:
        raise MountError(f"mounting needs libfuse 3; install libfuse3-3 ({e})") from None


def mounts() -> dict[str, str]:
    """Return what is mounted in this namespace: directory to type, the uppermost of each."""
    out = {}
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        name = before.split(" ")[4].encode(errors="surrogateescape").decode("unicode_escape")
        out[name] = after.split(" ")[0]
    return out


# -- the server -------------------------------------------------------------------------------


def serve(
    path: str, player: Player, played: int = 0, ready: Callable[[], None] = lambda: None
) -> None:
    """Serve a machine on a directory until it is unmounted, or a signal ends it.

    :param played: how many steps of the player's scenario were played; ready: called once the
        mount answers.
    :raises MountError: if it cannot be mounted.
    """
    check_fuse()
    check_mountpoint(path)
    from kmm.fusefs import TreeOperations, run

    mounted = False
    kept = os.dup(2)
    # Until the mount answers, what libfuse prints is kept for our own message.
    with tempfile.TemporaryFile() as said:
        sys.stderr.flush()
        os.dup2(said.fileno(), 2)

        def answers() -> None:
            nonlocal mounted
            mounted = True
            os.dup2(kept, 2)
            ready()

        tree = Tree(player.m)
        gc.freeze()  # a machine is large, and what a request makes goes by itself
        try:
            run(path, TreeOperations(tree, Control(tree, player, played), answers))
        except RuntimeError:
            if not mounted:
                said.seek(0)
                lines = said.read().decode(errors="replace").strip().splitlines()
                why = lines[-1].removeprefix("fuse: ") if lines else "libfuse does not say why"
                raise MountError(f"{path}: cannot be mounted on: {why}") from None
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def start(path: str, player: Player, played: int = 0, orphan: bool = False) -> int:
    """Serve a machine from a process of its own; return its id once the mount answers.

    :param orphan: whether it goes on when we end.
    :raises MountError: if it cannot be mounted.
    """
    check_fuse()
    check_mountpoint(path)
    parent = os.getpid()
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        try:
            _server(path, player, played, writing, None if orphan else parent)
        finally:
            os._exit(1)
    os.close(writing)
    with open(reading, encoding="utf-8") as news:
        said = news.read()
    if said != "ready":
        os.waitpid(pid, 0)
        raise MountError(said or f"{path}: the server ended before the mount answered")
    return pid


def _server(path: str, player: Player, played: int, news: int, parent: int | None) -> None:
    """What the process does that serves: nothing of its parent's stays open in it."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd != news:
            with contextlib.suppress(OSError):
                os.close(fd)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    if parent is not None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    def ready() -> None:
        os.write(news, b"ready")
        os.close(news)

    try:
        serve(path, player, played, ready)
    except MountError as e:
        os.write(news, str(e).encode())
        os._exit(1)
    os._exit(0)


def unmount(path: str) -> None:
    """Unmount a machine; whoever still has files of it open keeps nothing but errors.

    :raises MountError: if that is not possible.
    """
    tries = [["umount", path]] if os.getuid() == 0 else [["fusermount3", "-u", path]]
    for command in (*tries, [*tries[0][:-1], *(["-l"] if os.getuid() == 0 else ["-z"]), path]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
    raise MountError(f"{path}: {done.stderr.strip()}")


# -- for tests ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mounted machine: where it is, who serves it, and its control directory.

    Refusals are OSErrors with the errno; ``outcome()`` tells the rest.
    """

    path: Path
    pid: int

    def file(self, path: str) -> Path:
        """Return where a file of /proc or /sys is."""
        return self.path / path.lstrip("/")

    def read(self, path: str) -> str:
        """Return a file's text.

        :raises OSError: as open(2) and read(2).
        """
        return self.file(path).read_text()

    def write(self, path: str, value: str) -> None:
        """Write a value and a newline in one write(2), as ``echo`` does.

        :raises OSError: what the store is refused with.
        """
        fd = os.open(self.file(path), os.O_WRONLY | os.O_TRUNC)
        try:
            os.write(fd, f"{value}\n".encode())
        finally:
            os.close(fd)

    def control(self, name: str, value: str) -> None:
        """Write to a file of the control directory.

        :raises OSError: what it is refused with, and the reason that ``outcome()`` tells.
        """
        try:
            self.write(f"{CONTROL}/{name}", value)
        except OSError as e:
            # An open that failed asked for nothing, so the outcome is not of this request.
            if e.filename is not None:
                raise
            reason = "; ".join(self.outcome().splitlines())
            raise OSError(e.errno, f"{e.strerror}: {reason}") from None

    def plug(self, dimm_id: str, nid: int, start: int, size: int) -> None:
        """Put a DIMM in (see Machine.plug).

        :raises OSError: EBUSY if the platform does not take it, EINVAL.
        """
        self.control("plug", f"{dimm_id} {nid} {start:#x} {size:#x}")

    def unplug(self, dimm_id: str) -> None:
        """Ask for a DIMM's ejection (see Machine.unplug).

        :raises OSError: EBUSY if it stays, or if there is none.
        """
        self.control("unplug", dimm_id)

    def step(self, **step: Any) -> None:
        """Play a step of a scenario.

        :raises OSError: what it is refused with.
        """
        self.control("step", json.dumps(step))

    def order(self, line: str) -> None:
        """Order a failure, such as ``busy 33`` (see kmm.failure_orders).

        :raises OSError: EINVAL for what is no order; ``outcome()`` says why.
        """
        self.control("fail", line)

    def outcome(self) -> str:
        """Return what the last step, plug or unplug did."""
        return self.read(f"{CONTROL}/outcome")

    def status(self) -> dict[str, Any]:
        """Return what the server says of itself and the machine."""
        said: dict[str, Any] = json.loads(self.read(f"{CONTROL}/status"))
        return said

    def validate(self) -> None:
        """Recount everything the slow way (see Machine.validate).

        :raises AssertionError: at the first disagreement.
        """
        said = self.read(f"{CONTROL}/validate").strip()
        if said != "ok":
            raise AssertionError(said)


@contextlib.contextmanager
def mounted(
    m: Machine | MachineConfig | Mapping[str, Any] | Player | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Iterator[Mounted]:
    """Mount a machine for a while, served by a process of its own, which ends with the mount.

    :param m: a machine (the server has a copy of it as it is now), the description of a new one,
        or who plays a scenario; path: the directory, a new one if None.
    :raises MountError: if it cannot be mounted; ConfigError: for a description.
    """
    player = m if isinstance(m, Player) else player_of(m)
    with tempfile.TemporaryDirectory(prefix="kmm-") if path is None else _same(path) as where:
        pid = start(where, player)
        try:
            yield Mounted(Path(where), pid)
        finally:
            end(where, pid)


def end(path: str, pid: int) -> None:
    """End the server of a mount, one of our children, which takes the mount away.

    One that does not, because somebody has stopped it, is killed after a while.
    """
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGTERM)
        with open(os.pidfd_open(pid), "rb") as process:
            if not select.select([process], [], [], _PATIENCE)[0]:
                os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with contextlib.suppress(MountError):
        unmount(path)


@contextlib.contextmanager
def _same(path: str | os.PathLike[str]) -> Iterator[str]:
    yield os.fspath(path)


__all__ = ["KernelError", "MountError", "Mounted", "mounted"]
