"""Plays a recording's steps on a model machine and writes what it shows in the same layout."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kmm.clock import SECOND
from kmm.errors import ConfigError, FirmwareRefused, KernelError, shown
from kmm.load import play_loads, timeline
from kmm.machine import Machine
from kmm.params import PAGE_SIZE, MachineConfig
from kmm.procfs import kpageflags
from kmm.running_system import RemotePagesets, RunningSystem
from kmm.schema import RECORDED, check_boot_is_first, check_step
from kmm.symbols import TRACEABLE
from kmm.sysfs import lookup
from kmm.trace import visible_calls
from kmm.zoneinfo import parse_zoneinfo, zone_number

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
    """Check that a recording has what a replay needs, and that what else it holds is well formed.

    :raises ConfigError: naming the file, the step, the field, its value and what is allowed.
    """
    if not isinstance(recording, Mapping):
        raise ConfigError(f"{name}: {shown(recording)}; allowed: an object of 'machine', 'steps'")
    steps = recording.get("steps")
    if not isinstance(steps, list) or not steps or "machine" not in recording:
        raise ConfigError(f"{name}: needs 'machine' and a list 'steps' that begins with the boot")
    for key in ("title", "kernel"):
        if not isinstance(recording.get(key, ""), str):
            raise ConfigError(f"{name}: {key}: {shown(recording[key])}; allowed: text")
    if not isinstance(recording["machine"], Mapping):
        raise ConfigError(f"{name}: machine: {shown(recording['machine'])}; allowed: an object")
    for i, step in enumerate(steps):
        if not isinstance(step, Mapping) or not isinstance(step.get("step"), Mapping):
            raise ConfigError(f"{name}: steps[{i}].step: missing; allowed: an object with 'op'")
        where = f"{name}: steps[{i}].step"
        check_boot_is_first(check_step(step["step"], where, RECORDED, others=True)["op"], i, where)
        _check_observed(step, f"{name}: steps[{i}]")
    if "files" not in steps[0]:
        raise ConfigError(f"{name}: steps[0].files: missing; the boot step's files are needed")
    _check_scoring(recording, name)


def _check_observed(step: Mapping[str, Any], where: str) -> None:
    if "files" in step:
        _check_files(step["files"], f"{where}.files")
    for key in ("log", "uevents"):
        if key in step:
            _check_texts(step[key], f"{where}.{key}")
    if not isinstance(step.get("reply", {}), Mapping):
        raise ConfigError(f"{where}.reply: {shown(step['reply'])}; allowed: an object")
    calls = step.get("calls", [])
    if not isinstance(calls, list):
        raise ConfigError(f"{where}.calls: {shown(calls)}; allowed: a list of calls")
    for call in calls:
        ok = isinstance(call, list) and len(call) >= 2
        if not ok or not isinstance(call[0], int) or not isinstance(call[1], str):
            raise ConfigError(f"{where}.calls: {shown(call)}; allowed: [depth, function, times]")


def _check_scoring(recording: Mapping[str, Any], name: str) -> None:
    last = recording.get("score_until", 0)
    if not isinstance(last, int):
        raise ConfigError(f"{name}: score_until: {shown(last)}; allowed: the number of a step")
    if "classes" in recording:
        _check_texts(recording["classes"], f"{name}: classes")
    unstable = recording.get("unstable", [])
    if not isinstance(unstable, list):
        raise ConfigError(f"{name}: unstable: {shown(unstable)}; allowed: a list of facts")
    for fact in unstable:
        ok = isinstance(fact, list) and len(fact) == 3
        if not ok or not all(isinstance(part, int | str) for part in fact):
            raise ConfigError(f"{name}: unstable: {shown(fact)}; allowed: [step, class, key]")


def boot_machine(recording: Mapping[str, Any]) -> Machine:
    """Build the machine of a recording from its boot step.

    :raises ConfigError: naming what is wrong in its description or its files.
    """
    boot = recording["steps"][0]
    files = boot["files"]
    config = MachineConfig.from_dict(recording["machine"])
    if "struct_page_size" not in recording["machine"]:
        size = _struct_page_size(files.get("/proc/zoneinfo", ""), boot.get("log", []))
        config = replace(config, struct_page_size=size)
    if "pdpe1gb" not in recording["machine"]:
        lines = " ".join(boot.get("log", []))
        config = replace(config, pdpe1gb="HugeTLB: registered 1.00 GiB page size" in lines)
    m = Machine.from_files(files, config)
    m.dimm_backends = set()
    return m


def _struct_page_size(zoneinfo: str, log: list[str]) -> int:
    """Read off the first "Total pages" of the boot messages how large a memmap was reckoned.

    The kernel subtracts the memmap's pages there; more pages than 64 bytes each would leave
    mean a kernel without memory cgroups, whose struct page has 56.
    """
    match = re.search(r"Total pages: ([0-9]{1,12})", "\n".join(log))
    if not match:
        return 64
    zones = parse_zoneinfo(zoneinfo)
    left = 0
    for zone in zones:
        present, spanned = zone_number(zones, zone, "present"), zone_number(zones, zone, "spanned")
        # Large holes have no memmap, so the kernel then reckons with the present pages.
        described = present if spanned > present + (present >> 4) else spanned
        left += present - -(-described * 64 // PAGE_SIZE)
    return 56 if int(match[1]) > left else 64


def play_step(
    m: Machine, step: Mapping[str, Any], pagesets: RemotePagesets | None = None
) -> dict[str, Any]:
    """Play one step; return what a recording holds of its outcome, without the files.

    :param step: a step that check_recording has passed.
    :param pagesets: what passing time does to CPUs' lists, None if it does nothing.
    """
    out: dict[str, Any] = {"step": dict(step)}
    step = check_step(step, "step", RECORDED, others=True)
    op = step["op"]
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
        for part in timeline(step):
            if isinstance(part, float):
                if pagesets is not None:
                    pagesets.wait(part)
                continue
            play_loads(m, part)
            if pagesets is not None:
                pagesets.after_load(part)
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
    try:
        m = boot_machine(recording)
    except ConfigError as e:
        raise ConfigError(f"{name}: {e}") from None
    steps = [{"step": dict(recording["steps"][0]["step"]), "files": snapshot_files(m)}]
    system, pagesets = RunningSystem(m), RemotePagesets(m)
    log = uevents = 0
    for entry in recording["steps"][1:]:
        step = entry["step"]
        ost = len(m.ost_events)
        probes = m.trace() if step.get("trace") else None
        out = play_step(m, step, pagesets)
        m.kprobes = None
        pagesets.settle()
        # At least as long as a recording waits for the system to settle: daemons look around.
        m.clock.advance(SECOND)
        system.run()
        if probes is not None:
            out["calls"] = visible_calls(probes.calls, TRACEABLE)
        if events := _events(m, ost):
            out["events"] = events
        if step.get("snap", step["op"] != "pages"):
            out["log"], log = m.log[log:], len(m.log)
            out["uevents"], uevents = m.uevents[uevents:], len(m.uevents)
            out["files"] = snapshot_files(m)
            pagesets.wait_for_snapshot()
        if check:
            m.validate()
        steps.append(out)
    return {
        "title": recording.get("title", ""),
        "kernel": "kmm, after Linux 6.1",
        "machine": recording["machine"],
        "steps": steps,
    }


def _check_texts(value: Any, where: str) -> None:
    """Check a list of texts.

    :raises ConfigError: naming the place, the value and what is allowed.
    """
    if not isinstance(value, list):
        raise ConfigError(f"{where}: {shown(value)}; allowed: a list of texts")
    for i, text in enumerate(value):
        if not isinstance(text, str):
            raise ConfigError(f"{where}[{i}]: {shown(text)}; allowed: text")


def _check_files(value: Any, where: str) -> None:
    """Check an object of paths and texts.

    :raises ConfigError: naming the place, the value and what is allowed.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {shown(value)}; allowed: an object of paths and their texts")
    for path, text in value.items():
        if not isinstance(path, str) or not isinstance(text, str):
            raise ConfigError(f"{where}: {path}: {shown(text)}; allowed: text")
