"""The machine that a command works on: a new one, a scenario's, or one that files show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from kmm.errors import ConfigError
from kmm.machine import Machine
from kmm.offline_why import machine_of_files, machine_of_scenario

_OPTIONS = (
    click.option("--scenario", type=click.Path(dir_okay=False), help="Play this scenario first."),
    click.option(
        "--from",
        "source",
        type=click.Path(),
        help="What kmm import takes or has written (/ is this machine), or a recording.",
    ),
    click.option(
        "--steps",
        type=click.IntRange(min=0),
        help="How many steps to play: of a scenario all by default, of a recording none.",
    ),
)


def machine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options ``--scenario``, ``--from`` and ``--steps``."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def chosen_machine(scenario: str | None, source: str | None, steps: int | None) -> Machine:
    """Return the machine that the options name; without any, a new one of the default description.

    :param scenario: file to play; source: directory or recording; steps: how many are played.
    :raises ConfigError: for both sources, steps of neither, or what is wrong in the files.
    """
    if scenario is not None and source is not None:
        raise ConfigError("allowed: one of --scenario and --from")
    if scenario is not None:
        return machine_of_scenario(scenario, steps)
    if source is not None:
        return machine_of_files(source, steps)
    if steps is not None:
        raise ConfigError(f"--steps: {steps}; allowed: with --scenario or --from")
    return Machine()
