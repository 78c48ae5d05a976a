"""Plays a recording's steps on a model machine and writes what it shows in the same layout."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from kmm.errors import ConfigError, FirmwareRefused, KernelError
from kmm.machine import Machine
from kmm.procfs import kpageflags
from kmm.running_system import RunningSystem
from kmm.symbols import TRACEABLE
from kmm.sysfs import lookup
from kmm.trace import visible_calls

PROC_FILES = (
    "/proc/iomem",
    "/proc/zoneinfo",
    "/proc/buddyinfo",
    "/proc/pagetypeinfo",
    "/proc/meminfo",
    "/proc/sys/vm/min_free_kbytes",
    "/proc/sys/vm/lowmem_reserve_ratio",
    "/proc/sys/vm/watermark_scale_factor",
)
MEMORY, NODE = "/sys/devices/system/memory", "/sys/devices/system/node"
MODULE = "/sys/module/memory_hotplug/parameters"
BLOCK_FILES = ("state", "online", "removable", "phys_index", "phys_device", "valid_zones")


def _plain_files(m: Machine, base: str) -> list[str]:
    out = []
    for name in m.listdir(base):
        entry = lookup(m, f"{base}/{name}")
        if entry is not None and entry.names is None and entry.link is None:
            out.append(f"{base}/{name}")
    return out


def _text(m: Machine, path: str) -> str:
    entry = lookup(m, path)
    if entry is not None and entry.read is None:
        return f"cat: can't open '{path}': Permission denied"
    return m.read(path).removesuffix("\n")


def snapshot_files(m: Machine) -> dict[str, str]:
    """Read what a recording reads after each step, in its order (reading has side effects)."""
    files = {path: _text(m, path) for path in PROC_FILES}
    for path in _plain_files(m, MEMORY):
        files[path] = _text(m, path)
    for name in sorted(n for n in m.listdir(MEMORY) if n[6:].isdigit()):
        base = f"{MEMORY}/{name}"
        files.update({f"{base}/{f}": _text(m, f"{base}/{f}") for f in BLOCK_FILES})
        for sub in m.listdir(base):
            if sub.startswith("node"):
                files[f"{base}/{sub}"] = "link"
    for path in _plain_files(m, NODE):
        files[path] = _text(m, path)
    for name in sorted(n for n in m.listdir(NODE) if n.startswith("node")):
        base = f"{NODE}/{name}"
        for attribute in ("distance", "meminfo", "cpulist"):
            files[f"{base}/{attribute}"] = _text(m, f"{base}/{attribute}")
        for sub in m.listdir(base):
            if sub.startswith("memory"):
                files[f"{base}/{sub}"] = "link"
    for path in _plain_files(m, MODULE):
        files[path] = _text(m, path)
    files["kthreads"] = "\n".join(sorted(m.kthreads))
    return files


def check_recording(recording: Any, name: str) -> None:
    """Check that a recording has what a replay needs.

    :raises ConfigError: naming the file and the field.
    """
    steps = recording.get("steps") if isinstance(recording, Mapping) else None
    if not isinstance(steps, list) or not steps or "machine" not in recording:
        raise ConfigError(f"{name}: needs 'machine' and a list 'steps' that begins with the boot")
    if not isinstance(recording["machine"], Mapping):
        raise ConfigError(f"{name}: machine: {recording['machine']!r}; allowed: an object")
    boot = steps[0]
    if not isinstance(boot, Mapping) or not isinstance(boot.get("files"), Mapping):
        raise ConfigError(f"{name}: steps[0].files: missing; the boot step's files are needed")
    for i, step in enumerate(steps):
        if not isinstance(step, Mapping) or not isinstance(step.get("step"), Mapping):
            raise ConfigError(f"{name}: steps[{i}].step: missing")
        _check_step(step["step"], f"{name}: steps[{i}].step")


_FIELDS: dict[str, tuple[tuple[str, type[str] | type[int]], ...]] = {
    "boot": (),
    "plug": (("id", str), ("node", int), ("addr", int), ("size", int)),
    "unplug": (("id", str),),
    "write": (("path", str), ("value", str)),
    "sh": (("line", str),),
    "pages": (("pfn", int), ("count", int)),
}


def _check_step(step: Mapping[str, Any], where: str) -> None:
    op = step.get("op")
    if op not in _FIELDS:
        raise ConfigError(f"{where}.op: {op!r}; allowed: {', '.join(_FIELDS)}")
    for key, kind in _FIELDS[op]:
        value: Any = step.get(key)
        good = isinstance(value, kind) and not isinstance(value, bool)
        if not good or (isinstance(value, int) and value < 0):
            what = "a number from 0 on" if kind is int else "text"
            raise ConfigError(f"{where}.{key}: {value!r}; allowed: {what}")


def boot_machine(recording: Mapping[str, Any]) -> Machine:
    """Build the machine of a recording from its boot step."""
    boot = recording["steps"][0]
    files = dict(boot["files"])
    if boot.get("log"):
        files["dmesg"] = "\n".join(boot["log"])
    return Machine.from_files(files, recording["machine"])


def play_step(m: Machine, step: Mapping[str, Any]) -> dict[str, Any]:
    """Play one step; return what a recording holds of its outcome, without the files."""
    op = step["op"]
    out: dict[str, Any] = {"step": dict(step)}
    if op in ("plug", "unplug"):
        try:
            if op == "plug":
                m.plug(step["id"], step["node"], step["addr"], step["size"])
            else:
                m.unplug(step["id"])
            out["reply"] = {"return": {}}
        except FirmwareRefused as e:
            out["reply"] = {"error": {"class": "GenericError", "desc": str(e)}}
    elif op == "write":
        out["rc"], out["error"] = 0, ""
        try:
            m.write(step["path"], step["value"])
        except KernelError as e:
            out["rc"] = 1
            # What a shell says when it can neither open nor create the file.
            missing = e.errno == 2
            out["error"] = "nonexistent directory" if missing else os.strerror(e.errno or 0)
    elif op == "pages":
        runs = kpageflags(m, step["pfn"], step["count"])
        out["pages"] = [[n, f"{flags:016x}"] for n, flags in runs]
    elif op == "sh":
        out["rc"] = 0
    return out


def _events(m: Machine, seen: int) -> list[dict[str, Any]]:
    return [
        {"event": "ACPI_DEVICE_OST", "data": {"info": {"device": d, "source": s, "status": st}}}
        for d, s, st in m.ost_events[seen:]
    ]


def replay(recording: Any, name: str = "recording", check: bool = False) -> dict[str, Any]:
    """Replay a recording from its boot step.

    :param recording: the parsed JSON; ``machine``, the boot step and ``step`` entries are read.
    :param check: run validate() after every step.
    :return: what the model shows, in the recording's layout.
    :raises ConfigError: for a recording that cannot be played.
    """
    check_recording(recording, name)
    m = boot_machine(recording)
    steps = [{"step": dict(recording["steps"][0]["step"]), "files": snapshot_files(m)}]
    system = RunningSystem(m)
    log = uevents = 0
    for entry in recording["steps"][1:]:
        step = entry["step"]
        ost = len(m.ost_events)
        probes = m.trace() if step.get("trace") else None
        out = play_step(m, step)
        m.kprobes = None
        system.run()
        if probes is not None:
            out["calls"] = visible_calls(probes.calls, TRACEABLE)
        if events := _events(m, ost):
            out["events"] = events
        if step.get("snap", step["op"] != "pages"):
            out["log"], log = m.log[log:], len(m.log)
            out["uevents"], uevents = m.uevents[uevents:], len(m.uevents)
            out["files"] = snapshot_files(m)
        if check:
            m.validate()
        steps.append(out)
    return {
        "title": recording.get("title", ""),
        "kernel": "kmm, after Linux 6.1",
        "machine": recording["machine"],
        "steps": steps,
    }
