"""A mount namespace in which a machine's files lie over the host's (``kmm shell``).

What is not the machine's stays as the host has it.  Nobody inside can take the machine's files
away again: the command runs without CAP_SYS_ADMIN.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from kmm.dax_bus import DAX_MAJOR
from kmm.mount import MountError, answers, check_fuse, end, mounts, start
from kmm.scenario import Player

#: What has to lie over the host's, and what does where the machine has it.  Every link below one of
#: these leads to one of them, so that no path leads from the machine's files to the host's.
NEEDED = ("/sys/devices/system/memory", "/sys/devices/system/node")
MORE = (
    "/sys/devices/LNXSYSTM:00",
    "/sys/devices/platform",
    "/sys/devices/system/container",
    "/sys/devices/system/cpu",
    "/sys/devices/virtual/memory_tiering",
    "/sys/bus/acpi",
    "/sys/bus/container",
    "/sys/bus/cpu",
    "/sys/bus/dax",
    "/sys/bus/memory",
    "/sys/bus/memory_tiering",
    "/sys/bus/node",
    "/sys/bus/platform",
    "/sys/dev/char",
    "/sys/firmware/acpi/hotplug/memory",
    "/sys/firmware/memmap",
    "/sys/firmware/memory",
    "/sys/kernel/debug/extfrag",
    "/sys/kernel/debug/notifier-error-inject",
    "/sys/kernel/mm",
    "/sys/module/dax_hmem",
    "/sys/module/device_dax",
    "/sys/module/kmem",
    "/sys/module/memory_hotplug",
    "/proc/sys/vm",
)
#: Of these, where the host has none, no directory is built to put them into.
_NOT_BUILT = ("/sys/kernel/debug", "/proc")

_MS_BIND, _MS_REC, _MS_NOSUID, _MS_NODEV = 4096, 16384, 2, 4
_USER = ["--user", "--map-root-user"]
_PR_CAPBSET_DROP, _CAP_SYS_ADMIN = 24, 21
SIGNALLED = 128  # and the signal's number: the status that shells give a command that one ended
#: The statuses that shells give what is not there, and what cannot be executed.
NOT_FOUND, NOT_EXECUTABLE = 127, 126


class CommandError(MountError):
    """The command could not be started; ``status`` is what a shell would end with."""

    def __init__(self, command: str, error: OSError) -> None:
        code = error.errno or errno.EACCES
        if "/" not in command and shutil.which(command, os.F_OK) is None:
            code = errno.ENOENT  # whatever is wrong with a directory of PATH
        super().__init__(f"{command}: {os.strerror(code)}; it was not started")
        self.status = NOT_FOUND if code == errno.ENOENT else NOT_EXECUTABLE


def run_inside(arguments: Sequence[str]) -> int:
    """Run ``kmm`` with these arguments in a mount namespace of its own; return its status.

    Whoever may not make one becomes root of a user namespace first, where the host allows that.

    :raises MountError: if the host has no FUSE, or does not let us make the namespace.
    """
    check_fuse()
    unshare = _unshare()
    ours = os.readlink("/proc/self/ns/mnt")
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
    }
    kmm = [sys.executable, "-m", "kmm_command", "shell", "--outside", ours, *arguments]
    with tempfile.TemporaryDirectory(prefix="kmm-shell-") as where:
        # Python itself would answer Ctrl-C with a traceback; kmm_command lets it through.
        old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            child = subprocess.Popen([*unshare, *kmm], env=env | {"KMM_DIR": where})
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)
        with _passing_signals_on(child):
            return _status(child.wait())


def _unshare() -> list[str]:
    """Return the command that runs another one in a mount namespace of its own.

    :raises MountError: if there is no such tool, or the host does not allow it.
    """
    tool = shutil.which("unshare")
    if tool is None:
        raise MountError("unshare: not found; install util-linux")
    why = ""
    for user in [[], _USER] if os.geteuid() == 0 else [_USER]:
        command = [tool, *user, "--mount", "--propagation", "private", "--"]
        tried = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
        if tried.returncode == 0:
            return command
        why = tried.stderr.strip().removeprefix("unshare: ")
    raise MountError(
        f"kmm shell: this host lets us make no mount namespace ({why}); allowed: as root with "
        "CAP_SYS_ADMIN, or where others may make user namespaces"
    )


def shell(player: Player, played: int, command: Sequence[str], outside: str, where: str) -> int:
    """Run a command where a machine's files lie over the host's; return its exit status.

    :param player, played: the machine; outside: the mount namespace that this must not be;
        where: a directory to mount the machine on.
    :raises MountError: if the command could reach the host's files, or could not be started.
    """
    _check_namespace(outside)
    pid = start(where, player, played)
    try:
        return _shell_over(where, command)
    finally:
        # Mounts end with the namespace; what runs on in it is left with errors.
        end(where, pid)


def shell_over(where: str, command: Sequence[str], outside: str) -> int:
    """Run a command where the files of a machine that is mounted already lie over the host's.

    :param where: the directory that it is mounted on; outside: the mount namespace that this must
        not be.
    :raises MountError: if the command could reach the host's files, or could not be started.
    """
    _check_namespace(outside)
    if mounts().get(os.path.realpath(where)) != "fuse.kmm":
        raise MountError(f"{where}: no machine is mounted there")
    return _shell_over(os.path.realpath(where), command)


def _shell_over(where: str, command: Sequence[str]) -> int:
    covered = _cover(where)
    _make_nodes(where)
    _check_covered(where, covered)
    return _run(command, where)


def _check_namespace(outside: str) -> None:
    if os.readlink("/proc/self/ns/mnt") == outside:
        raise MountError("kmm shell: this is no mount namespace of its own; nothing was started")
    _check_private()


def _check_private() -> None:
    """Make sure that no mount of ours reaches another namespace, nor another's ours."""
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        words = line.partition(" - ")[0].split(" ")
        if any(word.startswith(("shared:", "master:")) for word in words[6:]):
            raise MountError(
                f"{words[4]}: mounts there reach other namespaces; nothing was started"
            )


def _mount(source: str | None, target: str, kind: str | None, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    if libc.mount(*encoded, ctypes.c_ulong(flags), None):
        code = ctypes.get_errno()
        raise MountError(f"{target}: cannot be covered: {os.strerror(code)}; nothing was started")


def _cover(where: str) -> list[str]:
    """Lay the machine's files over the host's; return the paths that are covered."""
    proc = [f"/proc/{name}" for name in sorted(os.listdir(f"{where}/proc")) if name != "sys"]
    covered = []
    for path in (*NEEDED, *MORE, *proc):
        if not os.path.exists(where + path):
            if path in NEEDED:
                raise MountError(f"{path}: the machine has none; nothing was started")
            continue
        if not os.path.lexists(path) and not path.startswith(_NOT_BUILT):
            _build(path)
        if os.path.lexists(path):
            _mount(where + path, path, None, _MS_BIND)
            covered.append(path)
    return covered


def _make_nodes(where: str) -> None:
    """Give /dev the nodes of the machine's dax devices, as the kernel would; none can be opened.

    Root of a user namespace may not make any.
    """
    devices = f"{where}/sys/bus/dax/devices"
    names = os.listdir(devices) if os.path.isdir(devices) else []
    if not names:
        return
    _rebuild("/dev")
    for name in names:
        with contextlib.suppress(PermissionError):
            number = os.makedev(DAX_MAJOR, int(name.removeprefix("dax").partition(".")[0]))
            os.mknod(f"/dev/{name}", stat.S_IFCHR | 0o600, number)


def _build(path: str) -> None:
    """Make a directory in /sys, whose parents nobody else can make one in."""
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        _build(parent)
    _rebuild(parent)
    os.mkdir(path)


def _rebuild(parent: str) -> None:
    """Cover a directory with one in memory that has all its entries, bound from the one below."""
    below = os.open(parent, os.O_PATH | os.O_DIRECTORY)
    old = f"/proc/self/fd/{below}"
    names = os.listdir(old)
    _mount("kmm", parent, "tmpfs", _MS_NOSUID | _MS_NODEV)
    for name in names:
        there, here = f"{old}/{name}", f"{parent}/{name}"
        mode = os.lstat(there).st_mode
        if stat.S_ISLNK(mode):
            os.symlink(os.readlink(there), here)
            continue
        if stat.S_ISDIR(mode):
            os.mkdir(here)
        else:
            Path(here).touch()
        _mount(there, here, None, _MS_BIND | _MS_REC)
    os.close(below)


def _check_covered(where: str, covered: Sequence[str]) -> None:
    """Make sure that what a path leads to is the machine's.

    :raises MountError: naming the path that is not.
    """
    device = os.stat(where).st_dev
    for path in (*NEEDED, *covered):
        if os.stat(path).st_dev != device:
            raise MountError(f"{path}: would still be this host's; nothing was started")


def _run(command: Sequence[str], where: str) -> int:
    def before() -> None:
        ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, _CAP_SYS_ADMIN, 0, 0, 0)

    env = os.environ | {"KMM": "1", "KMM_DIR": where}
    try:
        child = subprocess.Popen(command, env=env, preexec_fn=before)
    except OSError as e:
        raise CommandError(command[0], e) from None
    with _passing_signals_on(child):
        status = _status(child.wait())
    if not answers(where):
        print(
            "kmm shell: the machine's server has ended while the command ran; its files answered "
            "'Transport endpoint is not connected' from then on",
            file=sys.stderr,
        )
        return status or 1
    return status


def _status(code: int) -> int:
    return SIGNALLED - code if code < 0 else code


@contextlib.contextmanager
def _passing_signals_on(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Leave Ctrl-C to the child, which gets it too, and hand on what only we get."""

    def hand_on(number: int, frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(number)

    old = {n: signal.signal(n, hand_on) for n in (signal.SIGTERM, signal.SIGHUP)}
    old |= {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGQUIT)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
