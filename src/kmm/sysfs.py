"""The tree that a user reads and writes: paths to files, links and directories of /proc and /sys.

Nothing of the tree is stored: an entry is found by its path, and its text is made when read.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from kmm import procfs, swapfile, sysfs_hugetlb, vm_sysctl, vmstat
from kmm.errors import ImpossibleState, KernelError, NoSuchFile, kernel_error
from kmm.params import PAGE_SIZE
from kmm.sysfs_devices import DIRECTORIES as DEVICE_DIRECTORIES
from kmm.sysfs_devices import ENTRIES as DEVICE_ENTRIES
from kmm.sysfs_entry import Entry, directory, stored_text

if TYPE_CHECKING:
    from kmm.machine import Machine

NAME_MAX = 255

Maker = Callable[["Machine", "re.Match[str]"], "Entry | None"]

_PROC: dict[str, tuple[int, Callable[[Machine], str]]] = {
    "iomem": (0o444, procfs.iomem),
    "zoneinfo": (0o444, procfs.zoneinfo),
    "buddyinfo": (0o444, procfs.buddyinfo),
    "pagetypeinfo": (0o400, procfs.pagetypeinfo),
    "meminfo": (0o444, procfs.meminfo),
    "swaps": (0o444, swapfile.swaps),
    "vmstat": (0o444, vmstat.vmstat),
    "cmdline": (0o444, lambda m: m.config.cmdline + "\n"),
}


def _proc_file(m: Machine, match: re.Match[str]) -> Entry | None:
    def refuse(m: Machine, text: str) -> None:
        raise kernel_error(-errno.EIO, f"/proc/{match[1]} cannot be written")

    if match[1] == "kpageflags":
        return Entry(mode=0o400, read_at=procfs.kpageflags_read, write=refuse, proc=True)
    found = _PROC.get(match[1])
    if found is None:
        return None
    mode, show = found
    return Entry(mode=mode, read=show, write=refuse, proc=True)


def _vm_file(m: Machine, match: re.Match[str]) -> Entry | None:
    name = match[1]
    if name in sysfs_hugetlb.SYSCTLS:
        return Entry(
            mode=0o644,
            read=lambda m: sysfs_hugetlb.read_sysctl(m, name),
            write=lambda m, t: sysfs_hugetlb.write_sysctl(m, name, t),
            proc=True,
        )
    if name in vm_sysctl.ACTIONS:
        mode = vm_sysctl.ACTIONS[name]
        return Entry(
            mode=mode,
            read=(lambda m: "") if mode & 0o400 else None,
            write=lambda m, t: vm_sysctl.write_tunable(m, name, t),
            proc=True,
        )
    if name not in vm_sysctl.OTHERS and name not in vm_sysctl.TUNABLES:
        return None
    return Entry(
        mode=0o600 if name in vm_sysctl.SECRET else 0o644,
        read=lambda m: vm_sysctl.read_tunable(m, name),
        write=lambda m, t: vm_sysctl.write_tunable(m, name, t),
        proc=True,
    )


_ENTRIES: tuple[tuple[re.Pattern[str], Maker], ...] = tuple(
    (re.compile(pattern, re.ASCII), maker)
    for pattern, maker in (
        (r"/proc/(\w+)", _proc_file),
        (r"/proc/sys/vm/([\w-]+)", _vm_file),
        *DEVICE_ENTRIES,
    )
)


def _literal_prefix(pattern: str) -> str:
    """Return what every path that a pattern matches begins with."""
    match = re.match(r"\(?([\w/:-]*)(?![?*+{])", pattern)
    return match[1] if match else ""


# Most patterns need not be tried, as the beginning of a path tells.
_HEAD = len("/sys/devices/system/memory")
_PREFIXES = tuple(_literal_prefix(pattern.pattern) for pattern, _ in _ENTRIES)

_FIXED: dict[str, tuple[str, ...]] = {
    "/": ("proc", "sys"),
    "/proc": (*sorted((*_PROC, "kpageflags")), "sys"),
    "/proc/sys": ("vm",),
    "/proc/sys/vm": tuple(
        sorted(
            {
                *vm_sysctl.TUNABLES,
                *vm_sysctl.ACTIONS,
                *sysfs_hugetlb.SYSCTLS,
                *vm_sysctl.OTHERS,
            }
        )
    ),
    **DEVICE_DIRECTORIES,
}

#: Directories that nobody may make anything in, not even their owner.
_READ_ONLY = frozenset(("/proc", "/proc/sys", "/proc/sys/vm"))

MAXSYMLINKS, NAME_MAX, PATH_MAX = 40, 255, 4096


def entry_at(m: Machine, path: str) -> Entry | None:
    """Return what is at an absolute path without links, ``.`` or ``..`` inside; None if nothing."""
    if path in _FIXED:
        return Entry(mode=0o555 if path in _READ_ONLY else 0o755, names=_FIXED[path])
    for maker, match in _makers(path):
        entry = maker(m, match)
        if entry is not None:
            return _as_saved(m, path, entry) if path in m.saved_texts else entry
    return None


@lru_cache(maxsize=4096)
def _makers(path: str) -> list[tuple[Maker, re.Match[str]]]:
    """Return who may know of a path, whatever the machine."""
    found = [(maker, pattern.fullmatch(path)) for pattern, maker in _near(path[:_HEAD])]
    return [(maker, match) for maker, match in found if match]


def _as_saved(m: Machine, path: str, entry: Entry) -> Entry:
    """Return a file of a saved machine that is shown in the words it was saved in."""
    show, saved = entry.read, m.saved_texts[path]
    if show is None:
        return entry
    return replace(entry, read=lambda m: saved.shown(show(m)))


@lru_cache(maxsize=256)
def _near(head: str) -> list[tuple[re.Pattern[str], Maker]]:
    """Return the entries whose paths may begin like this."""
    both = zip(_ENTRIES, _PREFIXES, strict=True)
    return [entry for entry, prefix in both if head.startswith(prefix[:_HEAD])]


def _walk(m: Machine, path: str, follow_last: bool) -> Entry:
    """Return what is at a path, going through links and directories name by name (namei).

    :raises NoSuchFile: a name is not there; NotADirectory: a file stands in the middle;
        KernelError: ELOOP after 40 links, ENAMETOOLONG.
    """
    if not path.startswith("/"):
        raise kernel_error(-errno.ENOENT, f"{path!r}; allowed: an absolute path")
    if len(path.encode(errors="replace")) >= PATH_MAX:
        raise kernel_error(-errno.ENAMETOOLONG, f"a path of {len(path)} characters")
    todo = path.split("/")[::-1]
    here, entry, links = "", directory(_FIXED["/"]), 0
    while todo:
        name = todo.pop()
        if entry.names is None:
            raise kernel_error(-errno.ENOTDIR, f"{here} in {path}")
        if name in ("", "."):
            continue
        if len(name.encode(errors="replace")) > NAME_MAX:
            raise kernel_error(-errno.ENAMETOOLONG, path)
        if name == "..":
            here = here.rpartition("/")[0]
            entry = entry_at(m, here or "/") or entry
            continue
        found = entry_at(m, f"{here}/{name}")
        if found is None:
            raise kernel_error(-errno.ENOENT, path)
        if found.link is not None and (todo or follow_last):
            links += 1
            if links > MAXSYMLINKS:
                raise kernel_error(-errno.ELOOP, path)
            todo += found.link.split("/")[::-1]
            continue
        here, entry = f"{here}/{name}", found
    return entry


def lookup(m: Machine, path: str) -> Entry | None:
    """Return what is at a path, following links before it; None if nothing is."""
    try:
        return _walk(m, path, False)
    except KernelError:
        return None


def follow(m: Machine, path: str) -> Entry:
    """Return what is at a path, following it if it is a link.

    :raises NoSuchFile, NotADirectory: if nothing is.
    """
    return _walk(m, path, True)


def read(m: Machine, path: str) -> str:
    """Return the text of a file.

    :raises NoSuchFile, IsADirectory, AccessDenied: as opening and reading it would.
    """
    entry = follow(m, path)
    if entry.names is not None:
        raise kernel_error(-errno.EISDIR, path)
    if entry.read_at is not None:
        raise kernel_error(-errno.EINVAL, f"{path} is no text; Machine.kpageflags has its words")
    if entry.read is None:
        raise kernel_error(-errno.EACCES, f"{path} is write-only")
    return entry.read(m)


def write(m: Machine, path: str, value: str) -> None:
    """Write a value and a newline to a file, as ``echo VALUE > PATH`` does.

    :raises KernelError: the errno that the writer gets; nothing has changed then, but for what
        the kernel too leaves behind (see symbols.LEFT_BEHIND).
    """
    try:
        entry = follow(m, path)
    except NoSuchFile:
        # sysfs lets nobody create files; elsewhere the missing name itself is reported.
        parent = lookup(m, path.rpartition("/")[0] + "/")
        if parent is not None and path.startswith("/sys/"):
            raise kernel_error(-errno.EACCES, f"no file {path}, and none can be made") from None
        raise
    if entry.names is not None:
        raise kernel_error(-errno.EISDIR, path)
    if entry.write is None or (not entry.mode & 0o200 and not entry.proc):
        raise kernel_error(-errno.EACCES, f"{path} is read-only")
    data = f"{value}\n".encode()
    # sysfs takes a page at a time, and the writer comes back with the rest; a sysctl sees one.
    for at in range(0, 1 if entry.proc else len(data), PAGE_SIZE):
        entry.write(m, stored_text(entry, data[at : at + PAGE_SIZE]))


def listdir(m: Machine, path: str) -> list[str]:
    """Return the sorted names in a directory.

    :raises NoSuchFile: if there is none; NotADirectory: if it is a file.
    """
    entry = follow(m, path)
    if entry.names is None:
        raise kernel_error(-errno.ENOTDIR, path)
    return sorted(entry.names)


def readlink(m: Machine, path: str) -> str:
    """Return a link's target.

    :raises NoSuchFile: if there is nothing; InvalidArgument: if it is no link.
    """
    entry = _walk(m, path, False)
    if entry.link is None:
        raise kernel_error(-errno.EINVAL, f"{path} is no link")
    return entry.link


def entries(m: Machine, top: str = "/") -> Iterator[tuple[str, Entry]]:
    """Yield path and entry of everything below a directory, each directory before what is in it.

    Links are not followed; names are in order.

    :param top: path of a directory that no link leads to.
    :raises NoSuchFile: if there is none; NotADirectory: if it is a file.
    """
    base = top.rstrip("/")
    for name in listdir(m, top):
        path = f"{base}/{name}"
        entry = entry_at(m, path)
        if entry is None:
            raise ImpossibleState(f"entries: {path} is listed but not there")
        yield path, entry
        if entry.names is not None and entry.link is None:
            yield from entries(m, path)


@dataclass(frozen=True, slots=True)
class Stat:
    """What stat(2) tells of an entry: its kind, permission bits and size in bytes."""

    kind: str
    mode: int
    size: int


def stat(m: Machine, path: str) -> Stat:
    """Return the kind (``file``, ``directory``, ``link``), mode and size of what is at a path.

    :raises NoSuchFile: if there is nothing.
    """
    entry = _walk(m, path, False)
    if entry.link is not None:
        return Stat("link", 0o777, 0)
    if entry.names is not None:
        return Stat("directory", entry.mode, 0)
    return Stat("file", entry.mode, 0 if entry.proc else entry.size)
