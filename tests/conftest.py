"""Fixtures that many tests share."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from kmm import Machine, MachineConfig

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a job in the background has it, and all that it starts: tests that press Ctrl-C would wait.
    signal.signal(signal.SIGINT, signal.default_int_handler)

RECORDINGS = Path(__file__).parent / "recordings"
DIMM = 0x100000000


def two_nodes(cmdline: str = "memhp_default_state=offline", **more: Any) -> Machine:
    """A machine of 1 GiB with a second node that has no memory."""
    nodes = [{"cpus": "0-1", "memory": "1G"}, {}]
    data = {"memory": "1G", "maxmem": "16G", "cpus": 2, "nodes": nodes, "cmdline": cmdline}
    return Machine(MachineConfig.from_dict({**data, **more}))


def with_nobody_to_kill(m: Machine) -> Machine:
    """The machine, whose requests fail where else a task had to go."""
    m.ops.out_of_memory = lambda *request: False
    return m


@pytest.fixture
def m() -> Machine:
    return two_nodes()


def recording(name: str) -> dict[str, Any]:
    """A recording by its name, parsed."""
    return json.loads((RECORDINGS / f"{name}.json").read_text())
