"""The machine that a command works on: a new one, a scenario's, or one that files show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kmm.data_files import load_data
from kmm.errors import ConfigError
from kmm.import_machine import is_machine, load_machine
from kmm.machine import Machine
from kmm.params import MachineConfig
from kmm.replay import boot_machine, check_recording, play_step
from kmm.scenario import Player, Scenario, load_scenario


def _how_many(steps: int | None, there: int, default: int) -> int:
    if steps is None:
        return default
    if steps > there:
        raise ConfigError(f"--steps: {steps}; allowed: 0 to {there}")
    return steps


def player_of(m: Machine | MachineConfig | Mapping[str, Any] | None = None) -> Player:
    """Return who plays steps on a machine.

    :param m: a machine, or the description of a new one; None for the one that is the default.
    :raises ConfigError: for a description that is not allowed.
    """
    if isinstance(m, Mapping):
        m = MachineConfig.from_dict(m)
    if not isinstance(m, Machine):
        m = Machine(m)
    return Player(Scenario("a machine", m.config, ()), m)


def player_of_scenario(path: str, steps: int | None = None) -> tuple[Player, int]:
    """Return who plays a scenario, and how many of its steps were played.

    :param path: of the file; steps: how many are played, all if None.
    :raises ConfigError: as load_scenario, and for more steps than there are.
    """
    scenario = load_scenario(path)
    n = _how_many(steps, len(scenario.steps), len(scenario.steps))
    player = Player(scenario)
    for step in scenario.steps[:n]:
        player.play(step)
    return player, n


def machine_of_files(path: str, steps: int | None = None) -> Machine:
    """Return the machine that files of a real one show, or a recording.

    :param path: of the recording's file, or whatever import_machine.load_machine takes.
    :param steps: how many of the recording's steps are played, none if None.
    :raises ConfigError: naming the file and what is wrong in it.
    """
    if is_machine(path):
        _how_many(steps, 0, 0)
        return load_machine(path)
    recording = load_data(path)
    check_recording(recording, path)
    n = _how_many(steps, len(recording["steps"]) - 1, 0)
    try:
        m = boot_machine(recording)
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from None
    for entry in recording["steps"][1 : n + 1]:
        play_step(m, entry["step"])
    return m


def chosen_player(
    scenario: str | None, source: str | None, steps: int | None
) -> tuple[Player, int]:
    """Return who plays on the machine that the options name, and how many steps were played.

    :param scenario: file to play; source: directory, tar file, machine.json or recording; without
        any, a new machine of the default description.
    :param steps: how many are played before: of a scenario all if None, of a recording none.
    :raises ConfigError: for both sources, steps of neither, or what is wrong in the files.
    """
    if scenario is not None and source is not None:
        raise ConfigError("allowed: one of --scenario and --from")
    if scenario is not None:
        return player_of_scenario(scenario, steps)
    if source is not None:
        return player_of(machine_of_files(source, steps)), 0
    if steps is not None:
        raise ConfigError(f"--steps: {steps}; allowed: with --scenario or --from")
    return player_of(), 0


def chosen_machine(scenario: str | None, source: str | None, steps: int | None) -> Machine:
    """Return the machine that the options name, as chosen_player."""
    return chosen_player(scenario, source, steps)[0].m
