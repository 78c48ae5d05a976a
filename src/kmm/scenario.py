"""Scenario files: reading, checking everything before anything runs, playing."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kmm.errors import ConfigError, FirmwareRefused, KernelError, shown
from kmm.load import play_loads
from kmm.machine import Machine
from kmm.params import MachineConfig
from kmm.procfs import kpageflags
from kmm.scenario_check import check_together
from kmm.schema import GFP_WORDS, SCHEMA, check_step
from kmm.trace_graph import Timeline
from kmm.workload import OPS as WORKLOAD_OPS
from kmm.workload import Workload

_KEYS = ("machine", "steps", "title")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class Scenario:
    """A checked scenario: what to build and what to do with it."""

    title: str
    config: MachineConfig
    steps: tuple[dict[str, Any], ...]


def check_scenario(data: Any, name: str) -> Scenario:
    """Check a whole scenario.

    :param data: the parsed file; name: its name, for messages.
    :raises ConfigError: naming file, step, field, value and what is allowed.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{name}: not an object with 'machine' and 'steps'")
    for key in data:
        if key not in _KEYS:
            raise ConfigError(
                f"{name}: {key}: {shown(data[key])}; no such field; allowed: {', '.join(_KEYS)}"
            )
    steps = data.get("steps")
    if not isinstance(steps, list):
        have = shown(steps) if "steps" in data else "missing"
        raise ConfigError(f"{name}: steps: {have}; allowed: a list of steps")
    title = data.get("title", name)
    if not isinstance(title, str):
        raise ConfigError(f"{name}: title: {shown(title)}; allowed: text")
    try:
        config = MachineConfig.from_dict(data.get("machine", {}))
    except ConfigError as e:
        raise ConfigError(f"{name}: {e}") from None
    checked = [check_step(s, f"{name}: step {i}") for i, s in enumerate(steps, 1)]
    check_together(checked, config, name)
    return Scenario(title, config, tuple(checked))


def load_data(path: str | os.PathLike[str]) -> Any:
    """Read a TOML file (named ``.toml``, in whatever case) or a JSON file (all others).

    :raises ConfigError: if it cannot be read or parsed, with the format and the place in it.
    """
    file = Path(path)
    kind = "TOML" if file.suffix.lower() == ".toml" else "JSON"
    try:
        # Some editors begin a file with a byte order mark.
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8 text"
        raise ConfigError(f"{file}: {reason}") from None
    try:
        if kind == "TOML":
            data = tomllib.loads(text)
        else:
            data = json.loads(text, object_pairs_hook=_object)
        if _SURROGATE.search(text):
            json.dumps(data, ensure_ascii=False, default=str).encode("utf-8")
    except RecursionError:
        raise ConfigError(f"{file}: nested too deeply") from None
    except ValueError as e:
        # Beside mistakes of the format: numbers of thousands of digits, halves of characters.
        raise ConfigError(f"{file}: read as {kind}: {e}") from None
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of a JSON file, which may name each of its keys once."""
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shown(key)} is there twice in one object")
            seen.add(key)
    return out


def load_scenario(path: str | os.PathLike[str]) -> Scenario:
    """Read and check a scenario file.

    :raises ConfigError: as load_data and check_scenario.
    """
    return check_scenario(load_data(path), os.fspath(path))


@dataclass(slots=True)
class Outcome:
    """What one step did: an error or none, and what became visible."""

    text: str
    error: str = ""
    log: list[str] = field(default_factory=list)
    uevents: list[str] = field(default_factory=list)
    output: str = ""
    calls: list[list[object]] = field(default_factory=list)
    timeline: Timeline | None = None


class Player:
    """Plays the steps of a scenario on one machine."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.m = Machine(scenario.config)
        self.workload = Workload(self.m)
        self.held: dict[str, list[tuple[npt.NDArray[np.uint64], int]]] = {}

    def play(self, step: Mapping[str, Any], trace: bool | str = False) -> Outcome:
        """Play one checked step; a refusal becomes the outcome's error.

        :param trace: whether its calls are recorded; ``timed`` for what durations are made of too.
        """
        m = self.m
        log, uevents = len(m.log), len(m.uevents)
        probes = m.trace() if trace or step.get("trace") else None
        out = Outcome(describe(step))
        if probes is not None and trace == "timed":
            probes.watcher = out.timeline = Timeline(m)
        try:
            out.output = self._act(step)
        except (KernelError, FirmwareRefused) as e:
            out.error = str(e)
        finally:
            m.kprobes = None
            if out.timeline is not None:
                out.timeline.finish()
        out.log, out.uevents = m.log[log:], m.uevents[uevents:]
        out.calls = probes.calls if probes is not None else []
        return out

    def _act(self, step: Mapping[str, Any]) -> str:
        m, op = self.m, step["op"]
        if op == "plug":
            return f"_OST {m.plug(step['id'], step['node'], step['addr'], step['size']):#x}"
        if op == "unplug":
            return f"_OST {m.unplug(step['id']):#x}"
        if op == "write":
            m.write(step["path"], step["value"])
        elif op == "read":
            return m.read(step["path"]).rstrip("\n")
        elif op == "pages":
            runs = kpageflags(m, step["pfn"], step["count"])
            return "\n".join(f"{n:8} pages {flags:#x}" for n, flags in runs)
        elif op == "alloc":
            return self._alloc(step)
        elif op == "free":
            if step["id"] not in self.held:
                return "nothing to free: its alloc was refused"
            for pfns, order in self.held.pop(step["id"]):
                m.free_pages_bulk(pfns, order)
        elif op in WORKLOAD_OPS:
            return self.workload.play(step)
        elif op == "sh":
            return play_loads(m, step["load"]) if "load" in step else "skipped: changes nothing"
        return ""

    def _alloc(self, step: Mapping[str, Any]) -> str:
        order = step.get("order", 0)
        nid = self.m.pxm_to_node.get(step["node"], 0) if "node" in step else None
        gfp = GFP_WORDS[step.get("gfp", "GFP_KERNEL")]
        # More than there can be takes the same way, without room for all of them.
        most = min(step["count"], (self.m.totalram_pages >> order) + 1)
        pfns = self.m.alloc_pages_bulk(most, order, gfp, nid)
        self.held.setdefault(step["id"], []).append((pfns, order))
        return f"{len(pfns)} of {step['count']} blocks of order {order}"


def describe(step: Mapping[str, Any]) -> str:
    """Return a step in one line."""
    op = step["op"]
    if op == "plug":
        return (
            f"plug {step['id']}: {step['size'] >> 20} MiB at {step['addr']:#x}, node {step['node']}"
        )
    if op == "write":
        return f"echo {step['value']} > {step['path']}"
    names = [f.name for f in SCHEMA[op] if f.name in step and f.name != "load"]
    if op in WORKLOAD_OPS:
        more = " ".join(f"{name}={shown(step[name])}" for name in names if name != "id")
        return f"{op} {step['id']} {more}".strip()
    rest = " ".join(str(step[name]) for name in names)
    return f"{op} {rest}".strip()
