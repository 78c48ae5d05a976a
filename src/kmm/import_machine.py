"""The twin of a real machine: built from its files, with a report of what they did not tell.

Machine.from_files takes texts that are whole and agree.  Files of a real machine lack some, come
from another kernel, and were read one after the other; machine_repairs mends what can be mended.
What is written to machine.json are the texts as they were read, so that the machine is built
again from the same, bit for bit.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kmm.data_files import load_data
from kmm.errors import ConfigError, KernelError, shown
from kmm.import_report import Report, report_on_files
from kmm.machine import Machine
from kmm.machine_arch import check_architecture
from kmm.machine_files import Collected, collect
from kmm.machine_repairs import check_page_size, prepare
from kmm.progress import Bar, no_bar
from kmm.saved_machine import MEMORY, REQUIRED, Mismatch
from kmm.saved_texts import SavedText
from kmm.sysfs import lookup

FORMAT, VERSION = "kmm machine", 1
_KEYS = ("format", "version", "source", "files", "commands", "unreadable", "live")
#: How often a file that does not fit may be left out before the machine is given up.
MAX_REPAIRS = 40
# Reading it has the kernel work out the zones' reserves anew.
_READ_ACTS = "/proc/sys/vm/lowmem_reserve_ratio"
# Of a zone's pages, the part that /proc/iomem and the zone may disagree about.
_TOLERANCE = 64


@dataclass(slots=True)
class Twin:
    """A machine built from a real one's files, what it was built from, and the report."""

    machine: Machine
    collected: Collected
    report: Report = field(default_factory=Report)


def import_machine(path: str | os.PathLike[str], bar: Bar = no_bar) -> Twin:
    """Build the twin of a real machine.

    :param path: a directory with copies of ``/proc`` and ``/sys`` (``/`` is this machine), an
        unpacked sosreport, a tar file of either, or a machine.json that was written before.
    :param bar: is told how many files are read, and then how many are compared.
    :raises ConfigError: naming what cannot be used, what is wrong with it and what is allowed.
    """
    source = os.fspath(path)
    data = _json_of(source)
    collected = collect(source, bar) if data is None else _from_json(data, source)
    try:
        return build(collected, bar)
    except ConfigError as e:
        raise ConfigError(f"{source}: {e}") from None


def is_machine(path: str | os.PathLike[str]) -> bool:
    """Whether load_machine would take a path: it is no recording, scenario or other JSON file."""
    source = os.fspath(path)
    if os.path.isdir(source):
        return True
    try:
        with open(source, "rb") as file:
            start = file.read(1 << 16)
    except OSError:
        return False
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(b"{"):
        return re.match(rb'\{\s*"format"\s*:\s*"kmm machine"', text) is not None
    compressed = start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"))
    return compressed or start[257:262] == b"ustar"


def load_machine(path: str | os.PathLike[str]) -> Machine:
    """Return the machine that a directory, a tar file or a machine.json describes.

    :raises ConfigError: as import_machine.
    """
    return import_machine(path).machine


def build(collected: Collected, bar: Bar = no_bar) -> Twin:
    """Build the machine of collected files, mending what can be mended.

    :param bar: is told how many files are compared with the machine's.
    :raises ConfigError: naming the file, what is wrong in it and what is allowed.
    """
    _check_required(collected)
    check_architecture(collected.told, collected.files)
    repairs = prepare(collected)
    check_page_size(repairs.files)
    for _ in range(MAX_REPAIRS):
        try:
            m = Machine.from_files(repairs.with_free_blocks())
            break
        except Mismatch as e:
            if abs(e.present - e.have) > e.present // _TOLERANCE:
                raise
            repairs.set_present(e.zone, e.have)
        except ConfigError as e:
            if not repairs.leave_out(str(e)):
                raise
    else:
        raise ConfigError(f"more than {MAX_REPAIRS} of its files do not fit")
    m.saved_texts, hidden = _saved_texts(m, collected.files, bar)
    report = report_on_files(collected, repairs)
    report.hidden = hidden
    for text in m.saved_texts.values():
        report.differences += text.differences()
    return Twin(m, collected, report)


def _check_required(collected: Collected) -> None:
    for path in REQUIRED:
        if path in collected.unreadable:
            raise ConfigError(
                f"{path}: {collected.unreadable[path]}; needed: {', '.join(REQUIRED)}, read as root"
            )
        if path in collected.files and not collected.files[path].strip():
            raise ConfigError(
                f"{path}: empty; tar stores files of /proc as empty ones: copy them first, "
                "as by cp -r"
            )
        if path not in collected.files:
            raise ConfigError(f"{path}: missing; needed: {', '.join(REQUIRED)}")
    lines = collected.files["/proc/iomem"].split("\n")
    if all(re.match(r"\s*0+-0+ : ", line) for line in lines if line.strip()):
        raise ConfigError(
            "/proc/iomem: all its addresses are zero, as users without CAP_SYS_ADMIN see them; "
            "copy it, or run kmm import, as root"
        )


def _saved_texts(
    m: Machine, files: Mapping[str, str], bar: Bar
) -> tuple[dict[str, SavedText], list[str]]:
    """Return the files that kmm would show otherwise, and the paths that it does not show."""
    texts: dict[str, SavedText] = {}
    hidden: list[str] = []
    with bar(len(files), "text") as done:
        for number, (path, saved) in enumerate(files.items()):
            done(number, f"comparing {path}")
            if saved == "link" or not saved.strip() or path == _READ_ACTS:
                continue
            if path.startswith(MEMORY) and path.endswith("/state"):
                continue  # shows what it was built from, and there may be very many
            entry = lookup(m, path)
            if entry is None or entry.read is None:
                hidden.append(path)
                continue
            try:
                text = SavedText(path, saved, entry.read(m))
            except KernelError:
                hidden.append(path)
                continue
            if text.saved != text.built:
                texts[path] = text
    return texts, hidden


# -- machine.json -----------------------------------------------------------------------


def as_json(collected: Collected) -> str:
    """Return the text of a machine.json; docs/importing.md describes it."""
    data = {
        "format": FORMAT,
        "version": VERSION,
        "source": collected.source,
        "live": collected.live,
        "files": collected.files,
        "commands": collected.commands,
        "unreadable": collected.unreadable,
    }
    return json.dumps(data, indent=0, sort_keys=False) + "\n"


def _json_of(path: str) -> Any:
    """Return what is in a JSON file; None if the path is none."""
    try:
        with open(path, "rb") as file:
            start = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    except OSError:
        return None
    if not start.startswith((b"{", b"[")) and Path(path).suffix.lower() != ".json":
        return None
    return load_data(path)


def _texts(data: Mapping[str, Any], key: str, source: str) -> dict[str, str]:
    value = data.get(key, {})
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{source}: {key}: {shown(value)}; allowed: an object of paths and their texts"
        )
    for path, text in value.items():
        if not isinstance(text, str):
            raise ConfigError(f"{source}: {key}: {path}: {shown(text)}; allowed: text")
    return dict(value)


def _from_json(data: Any, source: str) -> Collected:
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise ConfigError(
            f"{source}: no machine.json: format is not {FORMAT!r}; kmm import writes such files"
        )
    version = data.get("version")
    if isinstance(version, bool) or version != VERSION:
        raise ConfigError(f"{source}: version: {shown(version)}; allowed: {VERSION}")
    for key in data:
        if key not in _KEYS:
            raise ConfigError(
                f"{source}: {key}: {shown(data[key])}; no such field; allowed: {', '.join(_KEYS)}"
            )
    name, live = data.get("source", source), data.get("live", False)
    if not isinstance(name, str):
        raise ConfigError(f"{source}: source: {shown(name)}; allowed: text")
    if not isinstance(live, bool):
        raise ConfigError(f"{source}: live: {shown(live)}; allowed: true, false")
    files, commands = _texts(data, "files", source), _texts(data, "commands", source)
    return Collected(name, files, _texts(data, "unreadable", source), commands, live)
