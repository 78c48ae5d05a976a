"""Scenario files: reading, checking everything before anything runs, playing."""

from __future__ import annotations

import errno
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt

from kmm.data_files import load_data
from kmm.errors import ConfigError, FirmwareRefused, KernelError, shown
from kmm.failure_orders import ORDERS, FailureOrders
from kmm.import_machine import load_machine
from kmm.load import play_loads
from kmm.machine import Machine
from kmm.params import MachineConfig
from kmm.procfs import kpageflags
from kmm.scenario_check import check_together
from kmm.schema import GFP_WORDS, SCHEMA, check_step
from kmm.trace import Kprobes
from kmm.trace_graph import Timeline
from kmm.wording import counted, sized
from kmm.workload import OPS as WORKLOAD_OPS
from kmm.workload import Workload

#: The word for the scenario that comes with kmm.
DEMO = "demo"
_KEYS = ("machine", "steps", "title")
#: By a key that they have: files that are taken for scenarios.
_OTHER_FILES = {
    "kernel": "this is a recording, which kmm replay and kmm verify play",
    "format": "this is a machine, of which a scenario says machine = { from = ... }",
    "kmm_run": "this is a saved run, which kmm report shows",
}


@dataclass(frozen=True, slots=True)
class Scenario:
    """A checked scenario: what to build and what to do with it."""

    title: str
    config: MachineConfig
    steps: tuple[dict[str, Any], ...]
    #: What the machine is a twin of: anything that import_machine.load_machine takes.
    source: str | None = None
    #: That twin, if nobody plays on it yet: building one of a terabyte takes seconds.
    loaded: list[Machine] = field(default_factory=list, compare=False, repr=False)


def check_scenario(data: Any, name: str) -> Scenario:
    """Check a whole scenario.

    :param data: the parsed file; name: its name, for messages.
    :raises ConfigError: naming file, step, field, value and what is allowed.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{name}: not an object with 'machine' and 'steps'")
    for key, what in _OTHER_FILES.items():
        if key in data:
            raise ConfigError(f"{name}: {key}: {what}; allowed: a scenario")
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
    machine = data.get("machine", {})
    source, loaded = None, list[Machine]()
    try:
        if isinstance(machine, Mapping) and "from" in machine:
            source = _source_of(machine, name)
            loaded.append(load_machine(source))
            config = loaded[0].config
        else:
            config = MachineConfig.from_dict(machine)
    except ConfigError as e:
        raise ConfigError(f"{name}: {e}") from None
    checked = [check_step(s, f"{name}: step {i}") for i, s in enumerate(steps, 1)]
    check_together(checked, config, name)
    return Scenario(title, config, tuple(checked), source, loaded)


def _source_of(machine: Mapping[str, Any], name: str) -> str:
    """Return the path that a machine is said to be the twin of; it counts from the scenario."""
    for key in machine:
        if key != "from":
            raise ConfigError(f"machine.{key}: {shown(machine[key])}; allowed: none beside 'from'")
    path = machine["from"]
    if not isinstance(path, str) or not path or "\0" in path:
        raise ConfigError(f"machine.from: {shown(path)}; allowed: the path of a machine.json")
    return os.path.join(os.path.dirname(name), path)


def load_scenario(path: str | os.PathLike[str]) -> Scenario:
    """Read and check a scenario file.

    :param path: of the file, or the word ``demo``: what ``kmm demo`` plays.
    :raises ConfigError: as load_data and check_scenario.
    """
    if path == DEMO:
        text = files("kmm").joinpath("scenarios/demo.toml").read_text(encoding="utf-8")
        return check_scenario(tomllib.loads(text), "demo.toml")
    return check_scenario(load_data(path), os.fspath(path))


@dataclass(slots=True)
class Outcome:
    """What one step did: an error or none, and what became visible.

    ``errno`` is the error's, EBUSY if firmware refused.
    """

    text: str
    error: str = ""
    errno: int = 0
    log: list[str] = field(default_factory=list)
    uevents: list[str] = field(default_factory=list)
    output: str = ""
    calls: list[list[object]] = field(default_factory=list)
    timeline: Timeline | None = None


class Player:
    """Plays the steps of a scenario on one machine.

    :param m: the machine; None for a new one as the scenario describes it.
    """

    def __init__(self, scenario: Scenario, m: Machine | None = None) -> None:
        self.scenario = scenario
        if m is None:
            source = scenario.source
            if source is None:
                m = Machine(scenario.config)
            else:
                m = scenario.loaded.pop() if scenario.loaded else load_machine(source)
        self.m = m
        self.workload = Workload(self.m)
        self.orders = FailureOrders(self.m)
        self.held: dict[str, list[tuple[npt.NDArray[np.uint64], int]]] = {}

    def play(self, step: Mapping[str, Any], trace: bool | str = False) -> Outcome:
        """Play one checked step; a refusal becomes the outcome's error.

        :param trace: whether its calls are recorded; ``timed`` for what durations are made of too.
        """
        m = self.m
        log, uevents = len(m.log), len(m.uevents)
        ordered = m.kprobes
        probes = m.trace() if trace or step.get("trace") else None
        out = Outcome(describe(step))
        if probes is not None and trace == "timed":
            probes.watcher = out.timeline = Timeline(m)
        try:
            out.output = self._act(step)
        except (KernelError, FirmwareRefused) as e:
            out.error = str(e)
            out.errno = (e.errno if isinstance(e, KernelError) else None) or errno.EBUSY
        finally:
            if probes is not None:
                # Orders that the step itself gave stand, its recording does not.
                m.kprobes = ordered or (Kprobes(before=probes) if probes.pending() else None)
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
            return "\n".join(
                f"{n:8} {'page ' if n == 1 else 'pages'} {flags:#x}" for n, flags in runs
            )
        elif op == "alloc":
            return self._alloc(step)
        elif op == "free":
            if step["id"] not in self.held:
                return "nothing to free: its alloc was refused"
            for pfns, order in self.held.pop(step["id"]):
                m.free_pages_bulk(pfns, order)
        elif op in WORKLOAD_OPS:
            return self.workload.play(step)
        elif op in ORDERS:
            return self.orders.play(step)
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
        return f"{len(pfns)} of {counted(step['count'], f'block of order {order}')}"


def describe(step: Mapping[str, Any]) -> str:
    """Return a step in one line."""
    op = step["op"]
    if op == "plug":
        size = sized(step["size"])
        return f"plug {step['id']}: {size} at {step['addr']:#x}, node {step['node']}"
    if op == "write":
        return f"echo {step['value']} > {step['path']}"
    names = [f.name for f in SCHEMA[op] if f.name in step and f.name != "load"]
    if op in WORKLOAD_OPS:
        more = [f"{name}={shown(step[name])}" for name in names if name != "id"]
        return " ".join([op, *([step["id"]] if "id" in step else []), *more])
    rest = " ".join(str(step[name]) for name in names)
    return f"{op} {rest}".strip()
