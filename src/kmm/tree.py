"""A machine's files as a file system has them: attributes, open files, stores (fs/kernfs).

Nothing here knows how the files reach a program.  Whoever looks at the machine or changes it
holds ``Tree.lock``.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from threading import RLock
from typing import TYPE_CHECKING

from kmm.errors import ImpossibleState, KernelError, kernel_error
from kmm.params import PAGE_SIZE
from kmm.sysfs import entry_at
from kmm.sysfs_acpi import acpi_path
from kmm.sysfs_entry import Entry, stored_text

if TYPE_CHECKING:
    from kmm.machine import Machine
    from kmm.memory_block import MemoryBlock

#: What kmalloc does not give, and so what a sysctl does not take (fs/proc/proc_sysctl.c).
KMALLOC_MAX_SIZE = 4 << 20
#: Lines of the kernel log, uevents and the like that are kept.
LINES_KEPT = 1 << 12

#: What every block has, with or without nodes and firmware.
_OF_BLOCK = re.compile(
    "/sys/devices/system/memory/memory([1-9][0-9]{0,8}|0)"
    "(|/(?:online|phys_device|phys_index|removable|state|uevent|valid_zones))"
).fullmatch
_NUMBERS = re.compile("[0-9]+")
DIRECTORY = stat.S_IFDIR | 0o755
LINK = stat.S_IFLNK | 0o777


@dataclass(frozen=True, slots=True)
class Attr:
    """Kind with permission bits (st_mode), and the size in bytes."""

    mode: int
    size: int


def attr_of(entry: Entry) -> Attr:
    """Return what stat(2) tells of an entry; sysfs calls every file a page long, proc empty."""
    if entry.link is not None:
        return Attr(LINK, 0)
    if entry.names is not None:
        return Attr(stat.S_IFDIR | entry.mode, 0)
    return Attr(stat.S_IFREG | entry.mode, 0 if entry.proc else entry.size)


class Lines:
    """The latest lines of a list that grows, each with a number that it keeps.

    :param lines: the list, of which the oldest are dropped.
    """

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.dropped = 0

    @property
    def end(self) -> int:
        """The number of the line that comes next."""
        return self.dropped + len(self.lines)

    def after(self, number: int) -> list[str]:
        """Return the lines that are still there from a number on."""
        return self.lines[max(0, number - self.dropped) :]

    def trim(self) -> None:
        """Drop the oldest lines if there are too many."""
        if len(self.lines) > 2 * LINES_KEPT:
            more = len(self.lines) - LINES_KEPT
            del self.lines[:more]
            self.dropped += more


class Tree:
    """The files of a machine.

    :param m: the machine; it belongs to the tree from now on.
    """

    def __init__(self, m: Machine) -> None:
        self.m = m
        self.lock = RLock()
        self.changes = 0
        self.log, self.uevents = Lines(m.log), Lines(m.uevents)
        self._of_blocks: dict[str, Attr] = {}
        self._kinds: dict[str, dict[str, int]] = {}
        self._seen = self.uevents.end
        self._firmware_map = set(m.firmware_map)
        self._physical_nodes = self._count_physical_nodes()

    def _count_physical_nodes(self) -> dict[str, int]:
        """Return the directory of each memory device that has links to blocks, and how many."""
        return {
            f"/sys/devices/{acpi_path(self.m, device.name)}": 1
            + max(device.physical_nodes.values())
            for device in self.m.acpi_devices
            if device.physical_nodes
        }

    def entry(self, path: str) -> Entry:
        """Return what is at a path without links inside.

        :raises NoSuchFile: if nothing is.
        """
        found = entry_at(self.m, path)
        # Every device has the same files for its power, so these alone do not ask for the device.
        if found is not None and "/power/" in path and entry_at(self.m, os.path.dirname(path)):
            return found
        if found is None or "/power/" in path:
            raise kernel_error(-errno.ENOENT, path)
        return found

    def attr(self, path: str) -> Attr:
        """Return what stat(2) tells of a path; no text is made for that.

        :raises NoSuchFile: if nothing is there.
        """
        with self.lock:
            # Programs ask for thousands of blocks, whose files have the same attributes in all.
            block, name = self._of_block(path)
            if block is None:
                return attr_of(self.entry(path))
            attr = self._of_blocks.get(name)
            if attr is None:
                attr = self._of_blocks[name] = attr_of(self.entry(path))
            return attr

    def _of_block(self, path: str) -> tuple[MemoryBlock | None, str]:
        """Return the block that a path is of, and what of it; None if it is something else."""
        match = _OF_BLOCK(path)
        if match is None:
            return None, ""
        number, name = match.groups()
        return self.m.memory_blocks.get(int(number)), name

    def listdir(self, path: str) -> list[tuple[str, int]]:
        """Return the names in a directory and the kind of each (of files, without permissions).

        What differs in numbers alone is of one kind, so thousands of blocks are looked up once.

        :raises NoSuchFile, NotADirectory: if it is none.
        """
        with self.lock:
            entry = self.entry(path)
            if entry.names is None:
                raise kernel_error(-errno.ENOTDIR, path)
            shape = _NUMBERS.sub("#", path)
            kinds = self._kinds.setdefault(shape, {})
            out = []
            for name in entry.names:
                alike = name.rstrip("0123456789")
                if alike not in kinds:
                    kinds[alike] = self._kind(f"{path.rstrip('/')}/{name}")
                out.append((name, kinds[alike]))
            return out

    def _kind(self, path: str) -> int:
        """Return the kind of an entry; of links and directories, with the mode they all have."""
        mode = attr_of(self.entry(path)).mode
        return stat.S_IFREG if stat.S_ISREG(mode) else mode

    def readlink(self, path: str) -> str:
        """Return a link's target.

        :raises NoSuchFile: if nothing is there; InvalidArgument: if it is no link.
        """
        with self.lock:
            entry = self.entry(path)
        if entry.link is None:
            raise kernel_error(-errno.EINVAL, f"{path} is no link")
        return entry.link

    def open(self, path: str, flags: int) -> OpenFile:
        """Open a file; ``flags`` as open(2) has them.

        :raises AccessDenied: if the file cannot be read or written at all, whoever asks, as sysfs
            and sysctls (fs/kernfs/file.c, fs/proc/proc_sysctl.c); other files of /proc leave that
            to the call that tries.
        :raises NoSuchFile, IsADirectory: if it is none.
        """
        with self.lock:
            entry = self.entry(path)
        if entry.names is not None:
            raise kernel_error(-errno.EISDIR, path)
        access = flags & os.O_ACCMODE
        if not entry.proc or path.startswith("/proc/sys/"):
            if access != os.O_WRONLY and (entry.read is None or not entry.mode & 0o444):
                raise kernel_error(-errno.EACCES, f"{path} is write-only")
            if access != os.O_RDONLY and (entry.write is None or not entry.mode & 0o222):
                raise kernel_error(-errno.EACCES, f"{path} is read-only")
        return OpenFile(self, path, entry)

    def happened(self) -> None:
        """Note that the machine has changed; called with ``lock`` held."""
        self.changes += 1
        for lines in (self.log, self.uevents):
            lines.trim()
        for more in (self.m.ost_events, self.m.swallowed):
            del more[: max(0, len(more) - LINES_KEPT)]

    def vanished(self) -> Iterator[str]:
        """Yield the paths that have gone since this was last asked, and links to them.

        A file system that lets its host keep names has to take these back.
        """
        with self.lock:
            lines = self.uevents.after(self._seen)
            self._seen = self.uevents.end
            gone = self._firmware_map - self.m.firmware_map.keys()
            self._firmware_map = set(self.m.firmware_map)
            nodes, drivers = list(self.m.node_devices), list(self.m.dax_drivers)
            links = self._physical_nodes
            if lines:
                self._physical_nodes = self._count_physical_nodes()
        for path, count in links.items():
            if count > self._physical_nodes.get(path, 0):
                yield from (f"{path}/physical_node{number or ''}" for number in range(count))
        yield from (f"/sys/firmware/memmap/{number}" for number in gone)
        for action, devpath, subsystem in (line.split(" ") for line in lines):
            name = devpath.rpartition("/")[2]
            if action == "unbind":
                yield f"/sys{devpath}/driver"
                yield from (f"/sys/bus/{subsystem}/drivers/{d}/{name}" for d in drivers)
            elif action in ("remove", "offline"):
                yield "/sys" + devpath
                yield f"/sys/bus/{subsystem}/devices/{name}"
                if subsystem == "memory":
                    yield from (f"/sys/devices/system/node/node{n}/{name}" for n in nodes)


class OpenFile:
    """An open file of the tree: its text as of the latest read from its start."""

    __slots__ = ("changes", "entry", "path", "text", "tree")

    def __init__(self, tree: Tree, path: str, entry: Entry) -> None:
        self.tree, self.path, self.entry = tree, path, entry
        self.changes = tree.changes
        self.text: bytes | None = None

    def _entry(self) -> Entry:
        if self.changes != self.tree.changes:
            try:
                self.entry = self.tree.entry(self.path)
            except KernelError:
                # What was opened is gone (kernfs_get_active).
                raise kernel_error(-errno.ENODEV, f"{self.path} is gone") from None
            self.changes = self.tree.changes
        return self.entry

    def read(self, size: int, offset: int) -> bytes:
        """Return at most ``size`` bytes from ``offset`` on; the text is made at its start.

        :raises NoSuchDevice: if the file is gone; others: as the file.
        """
        if self.entry.read_at is not None:
            with self.tree.lock:
                return self.entry.read_at(self.tree.m, offset, size)
        if offset == 0 or self.text is None:
            with self.tree.lock:
                entry = self._entry()
                if entry.read is None:
                    raise kernel_error(-errno.EINVAL, f"{self.path} is write-only")
                self.text = entry.read(self.tree.m).encode()
        return self.text[offset : offset + size]

    def write(self, data: bytes, offset: int) -> int:
        """Store what one write(2) brings.

        sysfs takes a page at a time wherever it is written to, and its parsers stop at a NUL;
        a sysctl looks at the first page of a write at the file's start, and ignores others.

        :return: how many bytes were taken.
        :raises KernelError: the errno that the writer gets.
        """
        with self.tree.lock:
            entry = self._entry()
            if entry.write is None:
                raise kernel_error(-errno.EINVAL, f"{self.path} is read-only")
            if not entry.proc:
                data = data[:PAGE_SIZE]
            elif len(data) >= KMALLOC_MAX_SIZE:
                raise kernel_error(-errno.ENOMEM, f"{len(data)} bytes; allowed: less than 4 MiB")
            elif offset and entry.mode & 0o222:
                return len(data)
            try:
                entry.write(self.tree.m, stored_text(entry, data))
            except ImpossibleState as e:
                self.tree.m.printk(f"kernel BUG: {e}")
                raise kernel_error(-errno.EIO, str(e)) from None
            finally:
                self.tree.happened()
            return len(data)
