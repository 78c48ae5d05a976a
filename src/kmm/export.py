"""A machine's /proc and /sys tree as plain files, or in a tar file, at one moment."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from kmm.errors import ConfigError, KernelError
from kmm.progress import Bar, no_bar
from kmm.sysfs import entries
from kmm.sysfs_entry import Entry

if TYPE_CHECKING:
    from kmm.machine import Machine

_TOPS = ("proc", "sys")
_BLOCK = re.compile("sys/devices/system/memory/memory[0-9]+")
_TAR_MODES = {
    ".tar": "",
    ".tar.gz": "gz",
    ".tgz": "gz",
    ".tar.bz2": "bz2",
    ".tar.xz": "xz",
}


@dataclass(slots=True)
class Exported:
    """What was written: how many of each, and the bytes in the files."""

    files: int = 0
    directories: int = 0
    links: int = 0
    size: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name."""
        return asdict(self)

    def count(self, entry: Entry, text: bytes) -> None:
        """Count an entry and its text."""
        if entry.link is not None:
            self.links += 1
        elif entry.names is not None:
            self.directories += 1
        else:
            self.files += 1
            self.size += len(text)


def _texts(m: Machine) -> Iterator[tuple[str, Entry, bytes]]:
    """Every entry of the tree below ``/`` with its text; a file that nobody can read has none.

    Binary files, which have a word for each page, are left out.
    """
    for path, entry in entries(m):
        if entry.read_at is not None:
            continue
        try:
            text = entry.read(m) if entry.read is not None else ""
        except KernelError:
            text = ""
        yield path[1:], entry, text.encode()


def _watched(m: Machine, bar: Bar) -> Iterator[tuple[str, Entry, bytes]]:
    """Yield the texts, and say how many of the memory blocks' directories have come."""
    blocks = 0
    with bar(len(m.memory_blocks), "block") as done:
        for name, entry, text in _texts(m):
            if entry.names is not None and _BLOCK.fullmatch(name):
                blocks += 1
                done(blocks, f"writing {name}")
            yield name, entry, text


def export_tree(
    m: Machine, directory: str | os.PathLike[str], force: bool = False, bar: Bar = no_bar
) -> Exported:
    """Write a machine's tree to a directory, with the modes and links that it shows.

    All of it is written beside its place and then moved there: where anything fails, the directory
    is as it was.

    :param directory: to make, or empty; force: whether ``proc`` and ``sys`` in it are replaced.
    :param bar: is told how many memory blocks are written.
    :return: what was written.
    :raises ConfigError: if the directory is not empty, or the host refuses.
    """
    target = Path(directory)
    try:
        there = sorted(os.listdir(target)) if target.exists() or target.is_symlink() else []
    except OSError as e:
        raise ConfigError(f"{target}: {e.strerror}; allowed: an empty or new directory") from None
    if target.resolve() == Path("/"):
        raise ConfigError(f"{target}: allowed: a directory other than the root")
    if there and not force:
        raise ConfigError(
            f"{target}: not empty ({len(there)} entries); allowed: an empty or new directory, "
            f"or --force to replace proc and sys in it"
        )
    made = not target.exists()
    try:
        target.mkdir(exist_ok=True)
        with _beside(target) as work:
            done = _write(m, work / "new", bar)
            _move(work, target)
    except BaseException as e:
        if made:
            with contextlib.suppress(OSError):
                target.rmdir()
        if isinstance(e, OSError):
            raise ConfigError(f"{e.filename or target}: {e.strerror}; nothing written") from None
        raise
    return done


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    # Inside, so that what is moved stays on one file system.
    work = Path(tempfile.mkdtemp(prefix=".kmm-export-", dir=target))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write(m: Machine, base: Path, bar: Bar) -> Exported:
    base.mkdir()
    done = Exported()
    for name, entry, text in _watched(m, bar):
        path = f"{base}/{name}"
        if entry.link is not None:
            os.symlink(entry.link, path)
        elif entry.names is not None:
            os.mkdir(path)
            os.chmod(path, 0o755)
        else:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(fd, "wb") as file:
                file.write(text)
                os.fchmod(fd, entry.mode)
        done.count(entry, text)
    return done


def _move(work: Path, target: Path) -> None:
    """Put the new directories in their place, and the old ones back where one cannot be."""
    moved: list[tuple[Path, Path]] = []
    old = work / "old"
    old.mkdir()
    try:
        for name in _TOPS:
            for source, place in (
                (target / name, old / name),
                (work / "new" / name, target / name),
            ):
                if source.exists() or source.is_symlink():
                    source.rename(place)
                    moved.append((source, place))
    except BaseException:
        for source, place in reversed(moved):
            place.rename(source)
        raise


def tar_kind(name: str) -> str | None:
    """Return the compression that a tar file's name asks for; None if it is no tar file's name."""
    return next((kind for end, kind in _TAR_MODES.items() if name.endswith(end)), None)


def export_tar(
    m: Machine, name: str | os.PathLike[str], force: bool = False, bar: Bar = no_bar
) -> Exported:
    """Write a machine's tree to a tar file; the same machine gives the same bytes.

    :param name: of the file, which says how it is compressed; force: whether one is replaced.
    :param bar: is told how many memory blocks are written.
    :return: what was written.
    :raises ConfigError: for another name, a file that is there, or what the host refuses.
    """
    target = Path(name)
    kind = tar_kind(target.name)
    if kind is None:
        raise ConfigError(f"{target}: allowed: a name that ends in {', '.join(_TAR_MODES)}")
    if not force and (target.exists() or target.is_symlink()):
        raise ConfigError(f"{target}: there already; allowed: a new file, or --force to replace it")
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with open(part, "xb") as file:
            done = _pack(m, file, kind, bar)
        part.replace(target)
    except OSError as e:
        raise ConfigError(f"{target}: {e.strerror}; nothing written") from None
    finally:
        part.unlink(missing_ok=True)
    return done


def _pack(m: Machine, file: IO[bytes], kind: str, bar: Bar) -> Exported:
    done = Exported()
    with contextlib.ExitStack() as stack:
        out: Any = file
        if kind == "gz":
            import gzip

            # Without a name and a time in its head.
            out = stack.enter_context(
                gzip.GzipFile("", "wb", fileobj=file, mtime=0, compresslevel=6)
            )
        mode: Any = f"w|{'' if kind == 'gz' else kind}"
        tar = stack.enter_context(tarfile.open(mode=mode, fileobj=out))
        for name, entry, text in _watched(m, bar):
            tar.addfile(_member(name, entry, len(text)), io.BytesIO(text))
            done.count(entry, text)
    return done


def _member(name: str, entry: Entry, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.uname = info.gname = "root"
    # Who unpacks it has to be able to fill a directory, which /proc allows nobody.
    info.mode = 0o755 if entry.names is not None else stat.S_IMODE(entry.mode)
    if entry.link is not None:
        info.type, info.linkname = tarfile.SYMTYPE, entry.link
    elif entry.names is not None:
        info.type = tarfile.DIRTYPE
    else:
        info.size = size
    return info
