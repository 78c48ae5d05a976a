"""Collects the texts of a machine's /proc and /sys: from a directory, a sosreport or an archive."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import os
import posixpath
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from kmm.errors import ConfigError, shown
from kmm.machine_arch import ARCH_FILES, ARCH_TEXT
from kmm.progress import Bar, no_bar

#: What is taken, in the order in which a live system's files are read: those whose counters run
#: first, right behind each other.
WANTED = (
    "proc/zoneinfo proc/buddyinfo proc/pagetypeinfo proc/meminfo proc/vmstat proc/iomem "
    "proc/cmdline proc/sys/vm/* sys/devices/system/memory/* "
    "sys/devices/system/memory/memory*/state "
    "sys/devices/system/memory/memory*/valid_zones sys/devices/system/memory/memory*/node* "
    "sys/devices/system/node/* sys/devices/system/node/node*/cpulist "
    "sys/devices/system/node/node*/distance sys/devices/system/node/node*/meminfo "
    "sys/devices/system/node/node*/vmstat sys/devices/system/node/node*/numastat "
    "sys/module/memory_hotplug/parameters/* "
    "sys/kernel/mm/transparent_hugepage/enabled sys/kernel/mm/hugepages/*/nr_hugepages "
    "sys/firmware/memmap/*/start sys/firmware/memmap/*/end sys/firmware/memmap/*/type"
).split()
#: What commands of a sosreport printed that tell what files it lacks.
LSMEM, SYSCTL = "sos_commands/memory/lsmem", "sos_commands/kernel/sysctl"
_COMMANDS = (LSMEM + "*", SYSCTL + "_-a")
#: Files that act when written and tell nothing when read.
_ACTIONS = frozenset(
    "compact_memory drop_caches probe soft_offline_page hard_offline_page stat_refresh".split()
)
MAX_TEXT = 64 << 20  # bytes of one file; all other limits are for archives
MAX_TEXTS = 512 << 20
MAX_MEMBERS = 4_000_000
MAX_UNPACKED = 64 << 30
# What compresses better than this holds nothing; logs reach 20 to 1.
RATIO_FROM, MAX_RATIO = 256 << 20, 200
_CHUNK = 1 << 16


@dataclass(slots=True)
class Collected:
    """Texts of a machine by path, and the files that were there but could not be read.

    ``told`` has what tells the architecture; nobody needs it once that is known.
    """

    source: str
    files: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    commands: dict[str, str] = field(default_factory=dict)
    live: bool = False
    told: dict[str, str] = field(default_factory=dict)


def _pattern(glob: str) -> str:
    return "".join("[^/]*" if c == "*" else re.escape(c) for c in glob)


_WANTED = re.compile("|".join(_pattern(glob) for glob in WANTED))
_COMMAND = re.compile("|".join(_pattern(glob) for glob in (*_COMMANDS, *ARCH_FILES)))


def _text(data: bytes) -> str:
    # An archive of sysfs files may pad them with NUL bytes up to the size that they claim.
    return data.rstrip(b"\0").decode("utf-8", errors="replace").rstrip("\n")


def collect(path: str | os.PathLike[str], bar: Bar = no_bar) -> Collected:
    """Collect the files of a machine.

    :param path: ``/`` for this machine; a directory with ``proc`` and ``sys`` in it, or an
        unpacked sosreport; or a tar file of either, compressed by gzip, bzip2 or xz.
    :param bar: is told how many files, or MiB of a tar file, are read.
    :raises ConfigError: if there is no such thing, it has none of the files, or it is broken.
    """
    source = os.fspath(path)
    if os.path.isdir(source):
        return _from_directory(source, bar)
    if not os.path.exists(source):
        raise ConfigError(f"{source}: no such file or directory")
    return _from_archive(source, bar)


def _from_directory(source: str, bar: Bar) -> Collected:
    base = _root_of(Path(source))
    out = Collected(source, live=os.path.realpath(base) == "/")
    wanted = [found for pattern in WANTED for found in sorted(base.glob(pattern))]
    with bar(len(wanted), "file") as done:
        for number, found in enumerate(wanted):
            done(number, f"reading {found}")
            name = "/" + found.relative_to(base).as_posix()
            if found.name in _ACTIONS:
                # That it is there tells how the kernel was built.
                out.files.setdefault(name, "")
            elif found.is_symlink() or found.is_dir():
                out.files[name] = "link"
            else:
                _read(out.files, out.unreadable, name, found)
        done(len(wanted), "building the machine")
    for pattern in _COMMANDS:
        for found in sorted(base.glob(pattern)):
            if found.is_file() and not found.is_symlink():
                _read(out.commands, out.unreadable, found.relative_to(base).as_posix(), found)
    for name in ARCH_FILES:
        with contextlib.suppress(OSError), open(base / name, "rb") as file:
            out.told[name] = _text(file.read(ARCH_TEXT))
    _check_found(out)
    return out


def _read(into: dict[str, str], unreadable: dict[str, str], name: str, path: Path) -> None:
    try:
        with open(path, "rb", buffering=0) as file:
            # The kernel refuses reads of /proc/sys that are much larger.
            data = b""
            while (more := file.read(_CHUNK)) and len(data) <= MAX_TEXT:
                data += more
    except OSError as e:
        unreadable[name] = e.strerror or str(e)
        return
    if len(data) > MAX_TEXT:
        unreadable[name] = f"more than {MAX_TEXT >> 20} MiB"
    else:
        into[name] = _text(data)


def _root_of(folder: Path) -> Path:
    """Return the directory that has proc or sys in it: this one, or the only one below it."""
    try:
        if (folder / "proc").is_dir() or (folder / "sys").is_dir():
            return folder
        inside = [d for d in folder.iterdir() if d.is_dir() and not d.is_symlink()]
        roots = [d for d in inside if (d / "proc").is_dir() or (d / "sys").is_dir()]
    except OSError as e:
        raise ConfigError(f"{folder}: {e.strerror}") from None
    if len(roots) > 1:
        names = ", ".join(sorted(d.name for d in roots)[:4])
        raise ConfigError(f"{folder}: several machines in it ({names}); allowed: one")
    return roots[0] if roots else folder


def _check_found(out: Collected) -> None:
    if not out.files and not out.unreadable:
        raise ConfigError(f"{out.source}: no /proc and /sys files of a machine in it")


class _Counting:
    """A stream that is unpacked, and stops at what no copy of a machine's files can be."""

    def __init__(self, unpacked: IO[bytes], packed: IO[bytes]) -> None:
        self.unpacked, self.packed = unpacked, packed
        self.total = 0

    def read(self, size: int) -> bytes:
        data = self.unpacked.read(size)
        self.total += len(data)
        if self.total > MAX_UNPACKED:
            raise ConfigError(f"more than {MAX_UNPACKED >> 30} GiB when unpacked")
        if self.total > RATIO_FROM and self.total > MAX_RATIO * max(1, self.packed.tell()):
            raise ConfigError(f"unpacks to more than {MAX_RATIO} times its size")
        return data


_OPENERS: tuple[tuple[bytes, Callable[[IO[bytes]], Any]], ...] = (
    (b"\x1f\x8b", lambda f: gzip.GzipFile(fileobj=f)),
    (b"BZh", bz2.BZ2File),
    (b"\xfd7zXZ\0", lzma.LZMAFile),
)
_BROKEN = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, OverflowError)


def _from_archive(source: str, bar: Bar) -> Collected:
    try:
        with open(source, "rb") as packed:
            start = packed.read(6)
            packed.seek(0)
            if start[:4] == b"\x28\xb5\x2f\xfd":
                raise ConfigError("compressed by zstd; allowed: tar, tar.gz, tar.bz2, tar.xz")
            opener = next((o for magic, o in _OPENERS if start.startswith(magic)), None)
            unpacked = opener(packed) if opener else packed
            stream: Any = _Counting(unpacked, packed)
            size = os.fstat(packed.fileno()).st_size
            with (
                tarfile.open(fileobj=stream, mode="r|", bufsize=_CHUNK) as tar,
                bar(size >> 20, "MiB") as done,
            ):
                members, links, unreadable = _members(
                    tar, lambda name: done(packed.tell() >> 20, f"reading {name}")
                )
    except ConfigError as e:
        raise ConfigError(f"{source}: {e}") from None
    except (OSError, *_BROKEN) as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise ConfigError(f"{source}: {e.strerror}") from None
        kind = "cut off" if isinstance(e, EOFError) or "unexpected end" in str(e) else "broken"
        raise ConfigError(
            f"{source}: no tar file, or one that is {kind}; allowed: tar, tar.gz, tar.bz2, tar.xz"
        ) from None
    return _sort_members(source, members, links, unreadable)


def _inner(name: str) -> tuple[str, str] | None:
    """Split a member's name where its /proc or /sys begins; None if it is not wanted."""
    parts = [p for p in name.split("/") if p not in ("", ".")]
    if ".." in parts:
        return None
    for i in range(min(len(parts), 3)):
        rest = "/".join(parts[i:])
        if _WANTED.fullmatch(rest) or _COMMAND.fullmatch(rest):
            return "/".join(parts[:i]), rest
    return None


_Member = tuple[str, str]  # the folder that the machine's files are in, path below it


def _members(
    tar: tarfile.TarFile, tell: Callable[[str], None]
) -> tuple[dict[_Member, str], dict[_Member, str], dict[_Member, str]]:
    """Read the wanted members; nothing is unpacked to disk, and no link is followed."""
    texts: dict[_Member, str] = {}
    links: dict[_Member, str] = {}
    unreadable: dict[_Member, str] = {}
    total = 0
    for number, member in enumerate(tar):
        if number >= MAX_MEMBERS:
            raise ConfigError(f"more than {MAX_MEMBERS} files in it")
        vars(tar)["members"] = []  # a stream keeps every header otherwise
        tell(member.name)
        at = _inner(member.name)
        if at is None:
            continue
        if not member.isreg():
            links[at] = member.linkname if member.issym() else ""
            continue
        if member.size > MAX_TEXT:
            unreadable[at] = f"more than {MAX_TEXT >> 20} MiB"
            continue
        total += member.size
        if total > MAX_TEXTS:
            raise ConfigError(f"more than {MAX_TEXTS >> 20} MiB of texts")
        file = tar.extractfile(member)
        texts[at] = _text(file.read() if file is not None else b"")
    return texts, links, unreadable


def _sort_members(
    source: str,
    texts: dict[_Member, str],
    links: dict[_Member, str],
    unreadable: dict[_Member, str],
) -> Collected:
    roots = {root for root, path in (*texts, *links, *unreadable) if not _COMMAND.fullmatch(path)}
    if len(roots) > 1:
        names = ", ".join(shown(r) for r in sorted(roots)[:4])
        raise ConfigError(f"{source}: several machines in it ({names}); allowed: one")
    out = Collected(source)
    for (_, path), text in texts.items():
        if path in ARCH_FILES:
            out.told[path] = text[:ARCH_TEXT]
        elif _COMMAND.fullmatch(path):
            out.commands[path] = text
        elif path.rpartition("/")[2] in _ACTIONS:
            out.files["/" + path] = ""
        else:
            out.files["/" + path] = text
    for (root, path), target in links.items():
        if path in ARCH_FILES:
            continue
        there = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        pointed = texts.get((root, there))
        if re.search(r"/(?:node|memory|cpu)[0-9]+$", path):
            out.files["/" + path] = "link"
        elif target and pointed is not None and _WANTED.fullmatch(path):
            out.files["/" + path] = pointed
        elif target:
            out.unreadable["/" + path] = "a link to what the archive does not hold"
    out.unreadable |= {
        "/" + path: why for (_, path), why in unreadable.items() if path not in ARCH_FILES
    }
    _check_found(out)
    return out


def names(files: Iterable[str], pattern: str) -> list[str]:
    """Return the paths that a glob pattern of WANTED describes."""
    want = re.compile(_pattern(pattern.lstrip("/")))
    return [path for path in files if want.fullmatch(path.lstrip("/"))]
