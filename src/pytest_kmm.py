"""Fixtures for test suites of programs that read and write /sys and /proc.

Installed with kmm, found by pytest.  It stands beside the package, so that a run that does not use
it imports nothing of kmm.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kmm.failure_orders import FailureOrders
    from kmm.machine import Machine
    from kmm.mount import Mounted
    from kmm.scenario import Player

#: Two nodes with CPUs and memory, and room for DIMMs.
MACHINE: Mapping[str, Any] = {
    "memory": "2G",
    "maxmem": "18G",
    "cpus": 4,
    "nodes": [{"cpus": "0-1", "memory": "1G"}, {"cpus": "2-3", "memory": "1G"}],
    "srat": "full",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what a run that has to mount machines asks for."""
    parser.getgroup("kmm").addoption(
        "--kmm-need-mount",
        action="store_true",
        help="fail, instead of skipping, where a machine cannot be mounted",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Describe the marker."""
    config.addinivalue_line(
        "markers",
        "kmm(machine=..., scenario=..., steps=...): the machine of kmm's fixtures: a description, "
        "or a scenario (a file or its content) and how many of its steps are played",
    )


def _player(request: pytest.FixtureRequest) -> Player:
    from kmm.machine_source import player_of
    from kmm.scenario import Player, check_scenario, load_scenario

    marker = request.node.get_closest_marker("kmm")
    given: dict[str, Any] = dict(marker.kwargs) if marker else {}
    unknown = given.keys() - {"machine", "scenario", "steps"}
    if unknown or (marker and marker.args):
        pytest.fail(
            f"marker kmm: {sorted(unknown) or marker.args}; allowed: machine, scenario, steps"
        )
    if "scenario" not in given:
        return player_of(given.get("machine", MACHINE))
    if "machine" in given:
        pytest.fail("marker kmm: machine and scenario; allowed: one of them")
    source = given["scenario"]
    is_file = isinstance(source, str | Path)
    scenario = load_scenario(source) if is_file else check_scenario(source, "scenario")
    player = Player(scenario)
    for step in scenario.steps[: given.get("steps")]:
        player.play(step)
    return player


@pytest.fixture
def _kmm_player(request: pytest.FixtureRequest) -> Player:
    return _player(request)


@pytest.fixture
def kmm_machine(_kmm_player: Player) -> Iterator[Machine]:
    """A machine, of the marker's description; it is recounted when the test is over."""
    m = _kmm_player.m
    yield m
    m.validate()


@pytest.fixture
def kmm_failures(kmm_machine: Machine, _kmm_player: Player) -> Iterator[FailureOrders]:
    """Failures to order of ``kmm_machine``, those of its scenario's steps among them.

    Of ``kmm_mount``, its ``order`` takes them.
    """
    orders = _kmm_player.orders
    yield orders
    orders.forget()


@pytest.fixture
def kmm_export(
    kmm_machine: Machine, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Path]:
    """A function that writes the tree of ``kmm_machine`` as it is now to a new directory.

    For programs that take another root and only read: writing changes no machine.
    """
    from kmm.export import export_tree

    def export() -> Path:
        directory = tmp_path_factory.mktemp("kmm")
        export_tree(kmm_machine, directory)
        return directory

    return export


@pytest.fixture
def kmm_mount(request: pytest.FixtureRequest) -> Iterator[Mounted]:
    """A mounted machine, of the marker's description, which a process of its own serves.

    The test is skipped where the host has no FUSE.  The machine is recounted when it is over.
    """
    from kmm.mount import MountError, check_fuse, mounted

    try:
        check_fuse()
    except MountError as e:
        if request.config.getoption("--kmm-need-mount"):
            pytest.fail(str(e))
        pytest.skip(str(e))
    with mounted(_player(request)) as machine:
        yield machine
        machine.validate()


@pytest.fixture
def kmm_run(
    kmm_mount: Mounted,
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs a program where the files of ``kmm_mount`` lie over the host's.

    It takes the program and its arguments, and whatever subprocess.run takes.
    """

    def run(command: Sequence[str], **more: Any) -> subprocess.CompletedProcess[str]:
        shell = [sys.executable, "-m", "kmm", "shell", f"--mounted={kmm_mount.path}", "--"]
        more = {"capture_output": True, "text": True, "timeout": 120, "check": False} | more
        done: subprocess.CompletedProcess[str] = subprocess.run([*shell, *command], **more)
        return done

    return run
