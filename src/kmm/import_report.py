"""What an import found, what it missed, and what it assumed instead."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from kmm.errors import shown
from kmm.machine_files import Collected, names
from kmm.saved_texts import Difference
from kmm.wording import counted

if TYPE_CHECKING:
    from kmm.machine_repairs import Repairs

SHOWN_DIFFERENCES = 12

_NODE, _MEMORY = "/sys/devices/system/node/", "/sys/devices/system/memory/"
_MODULE = "/sys/module/memory_hotplug/parameters/"
#: What is assumed where files are missing, by the pattern of their paths.
EXPECTED: dict[str, str] = {
    "/proc/iomem": "",
    "/proc/zoneinfo": "",
    "/proc/buddyinfo": "free blocks as pagetypeinfo counts them, or else the largest that fit",
    "/proc/pagetypeinfo": "all free blocks are Movable, and so are all pageblocks at first",
    "/proc/meminfo": "no huge pages in pools; 2 MiB pages map all RAM",
    "/proc/vmstat": "events are counted from 0",
    "/proc/cmdline": "no kernel parameters",
    "/proc/sys/vm/*": "tunables have the values that 6.1 boots with",
    _MEMORY + "block_size_bytes": "memory blocks of 128 MiB",
    _MEMORY + "auto_online_blocks": "blocks that are plugged in stay offline",
    _MEMORY + "memory*/state": "all System RAM is in blocks that are online",
    _MEMORY + "memory*/valid_zones": "the zones' spans tell which zone a block is in",
    _MEMORY + "memory*/node*": "the zones' spans tell which node a block is of",
    _NODE + "possible": "the nodes that other files name, and no others",
    _NODE + "online": "the nodes with memory are online",
    _NODE + "node*/cpulist": "node 0 has the one CPU",
    _NODE + "node*/distance": "10 within a node, 20 between nodes",
    _NODE + "node*/meminfo": "no huge pages in the nodes' pools",
    _NODE + "node*/numastat": "requests are counted from what zoneinfo shows",
    _MODULE + "online_policy": "contig-zones",
    _MODULE + "memmap_on_memory": "N",
    "/sys/kernel/mm/transparent_hugepage/enabled": "what 6.1 boots with",
    "/sys/firmware/memmap/*/start": "/proc/iomem tells what was plugged in after boot",
}
#: What no file tells, of any machine.
ALWAYS = (
    "where free blocks lie: laid out so that the counts are met, used pages from the bottom up",
    "who uses the pages in use: somebody unknown, in pages of the kinds that the counters tell",
    "the architecture, where no file told it: x86-64, as kmm models no other",
    "DIMMs: in no slot; blocks: in no memory group, none holds its own memmap",
    "pages on per-CPU lists: single ones",
    "swap: none, and no devices of dax; what meminfo says of swap stays as it was",
    "the kernel: behaves as 6.1, whatever it was",
)


@dataclass(frozen=True, slots=True)
class Note:
    """A file or a kind of files: whether it was there, and what was done about it."""

    path: str
    status: str  # present, missing, unreadable, inconsistent, derived
    count: int = 0
    detail: str = ""
    assumed: str = ""


@dataclass(slots=True)
class Report:
    """All that an import has to say; ``doubts`` tells whether any of it is a doubt."""

    notes: list[Note] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)

    @property
    def doubts(self) -> bool:
        """Whether a file was missing, unreadable, left out or mended."""
        return any(n.status != "present" for n in self.notes)

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "doubts": self.doubts,
            "files": [asdict(n) for n in self.notes],
            "assumed_always": list(ALWAYS),
            "differences": [asdict(d) for d in self.differences],
            "not_shown": self.hidden,
        }

    def lines(self) -> list[str]:
        """Return it in words."""
        out: list[str] = []
        titles = {
            "missing": "missing:",
            "unreadable": "there, but not readable:",
            "inconsistent": "mended, or left out because it does not fit:",
            "derived": "taken from elsewhere:",
        }
        present = sum(n.count for n in self.notes if n.status == "present")
        out.append(f"{counted(present, 'file')} taken")
        for status, title in titles.items():
            here = [n for n in self.notes if n.status == status]
            if here:
                out.append(title)
            for n in here:
                out.append(f"  {n.path}" + (f": {n.detail}" if n.detail else ""))
                if n.assumed:
                    out.append(f"    assumed: {n.assumed}")
        out.append("assumed of every machine:")
        out += [f"  {text}" for text in ALWAYS]
        return out + self._difference_lines()

    def _difference_lines(self) -> list[str]:
        if not self.differences:
            return ["every file is as kmm makes it"]
        lines = ["lines that kmm makes otherwise (another kernel's, not modelled, or read at"]
        lines.append("another moment); shown as saved until they change:")
        counts: dict[str, int] = {}
        for d in self.differences:
            counts[d.path] = counts.get(d.path, 0) + 1
        lines += [f"  {path}: {n}" for path, n in list(counts.items())[:SHOWN_DIFFERENCES]]
        if len(counts) > SHOWN_DIFFERENCES:
            lines.append(f"  and {counted(len(counts) - SHOWN_DIFFERENCES, 'more file')}")
        both = [d for d in self.differences if d.saved is not None and d.model is not None]
        for d in both[:SHOWN_DIFFERENCES]:
            lines.append(f"    {d.path}: {shown(d.saved)} is {shown(d.model)} in kmm")
        return [*lines, "  --json lists all of them"]


def report_on_files(collected: Collected, repairs: Repairs) -> Report:
    """Say of every kind of file whether it was there, and what is assumed if it was not."""
    report = Report()
    for pattern, assumed in EXPECTED.items():
        there = names(collected.files, pattern)
        derived = names(repairs.derived, pattern)
        reasons = [collected.unreadable[p] for p in names(collected.unreadable, pattern)]
        for why in sorted(set(reasons)):
            n = reasons.count(why)
            report.notes.append(Note(pattern, "unreadable", n, why + _remedy(why), assumed))
        if there:
            report.notes.append(Note(pattern, "present", len(there)))
        elif derived:
            why = repairs.derived[derived[0]]
            report.notes.append(Note(pattern, "derived", len(derived), why))
        elif not names(collected.unreadable, pattern) and not _needless(pattern, collected.files):
            report.notes.append(Note(pattern, "missing", 0, "", assumed))
    report.notes += [Note(path, "inconsistent", 1, why) for path, why in repairs.mended]
    return report


def _remedy(why: str) -> str:
    return "; copy it as root" if "ermission" in why else ""


def _needless(pattern: str, files: Mapping[str, str]) -> bool:
    """Whether a file that is missing tells nothing more than others did."""
    if pattern == "/proc/buddyinfo":
        return bool(files.get("/proc/pagetypeinfo"))
    if pattern not in (_NODE + "node*/distance", _NODE + "node*/numastat"):
        return False
    # With one node they tell nothing.
    return not any(re.match(_NODE + "node[1-9]", path) for path in files)
