"""``kmm run`` and ``kmm demo``: a scenario, step by step, and what became of the memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import click

from kmm.cli_frame import (
    OutFile,
    Watch,
    echo,
    echo_json,
    fail,
    interruptible,
    json_option,
    write_text,
)
from kmm.errors import ConfigError, ImpossibleState, ValidationError
from kmm.report_data import RunRecorder
from kmm.scenario import DEMO, Outcome, Player, Scenario, describe, load_scenario
from kmm.views import call_tree, layers, show

_TRACE = click.option("--trace", is_flag=True, help="Print the kernel functions of every step.")
_NAMES = click.option(
    "--names",
    type=click.Choice(["old", "6.1"]),
    default="6.1",
    show_default=True,
    help="Vocabulary of the call chains: older kernels' names, or 6.1's.",
)
_SAVE = click.option("--save", type=OutFile(), help="Also write the run there, for kmm report.")


def _print_outcome(number: int, out: Outcome, trace: bool, names: str) -> None:
    echo(f"step {number}: {out.text}")
    result = f"refused: {out.error}" if out.error else out.output or "done"
    for line in result.split("\n"):
        echo(f"    {line}")
    for line in out.uevents:
        echo(f"    uevent {line}")
    for line in out.log:
        echo(f"    kernel {line}")
    if trace and out.calls:
        click.echo(call_tree(out.calls, names))


def play_step(player: Player, number: int, step: Mapping[str, Any], trace: bool | str) -> Outcome:
    """Play a step; whatever goes wrong beyond a refusal is one line that names it.

    :raises click.ClickException: with the step's number and what failed.
    """
    try:
        return player.play(step, trace)
    except (ConfigError, ValidationError, ImpossibleState, click.ClickException):
        raise
    except MemoryError as e:
        why = str(e) or "this host has not enough memory"
        raise fail(f"step {number}: {why}") from None
    except Exception as e:
        # A fault of kmm's, or of what extends it; the machine may be half changed.
        raise fail(f"step {number}: kmm failed: {type(e).__name__}: {e}") from e


def _as_dict(out: Outcome) -> dict[str, Any]:
    return {
        "text": out.text,
        "error": out.error,
        "output": out.output,
        "uevents": out.uevents,
        "log": out.log,
        "calls": out.calls,
    }


def _played(watch: Watch, player: Player, trace: bool | str) -> Iterator[tuple[int, Outcome]]:
    """Play a scenario's steps one by one, with a bar, and recount the machine at the end."""
    steps = player.scenario.steps
    with watch.bar(len(steps), "step") as done:
        for number, step in enumerate(steps, 1):
            done(number - 1, describe(step))
            yield number, play_step(player, number, step, trace)
        done(len(steps), "the final recount")
        player.m.validate()


def play_for_report(watch: Watch, scenario: Scenario) -> dict[str, Any]:
    """Play a scenario and return what a report shows of it (see report_data)."""
    player = Player(scenario)
    recorder = RunRecorder(player.m, scenario.title, len(scenario.steps))
    for number, out in _played(watch, player, "timed"):
        recorder.step(number, out)
    return recorder.data


def save_run(path: str, run: Mapping[str, Any]) -> None:
    """Write a run for ``kmm report``.

    :raises ConfigError: if it cannot be written.
    """
    write_text(path, json.dumps(run, separators=(",", ":")) + "\n")


def _play(
    watch: Watch,
    scenario: Scenario,
    trace: bool,
    names: str,
    quiet: bool,
    as_json: bool,
    save: str | None,
) -> None:
    talks = not quiet and not as_json
    player = Player(scenario)
    recorder = (
        RunRecorder(player.m, scenario.title, len(scenario.steps)) if save is not None else None
    )
    before = now = layers(player.m)
    if talks:
        echo(scenario.title)
    played = []
    for number, out in _played(watch, player, "timed" if recorder else trace):
        if recorder:
            recorder.step(number, out)
        before, now = now, layers(player.m)
        if as_json:
            played.append(_as_dict(out))
        if talks:
            _print_outcome(
                number, out, trace or bool(scenario.steps[number - 1].get("trace")), names
            )
    if recorder and save is not None:
        save_run(save, recorder.data)
    if as_json:
        echo_json({"title": scenario.title, "steps": played, "machine": dict(now)})
        return
    if not quiet:
        click.echo("\nthe machine now (* new or changed, - gone since the step before)")
    click.echo(show(now, before))


@click.command()
@click.argument("scenario", type=click.Path(dir_okay=False))
@_TRACE
@_NAMES
@click.option("--quiet", is_flag=True, help="Print the final view only.")
@json_option
@_SAVE
@interruptible
def run(
    watch: Watch,
    scenario: str,
    trace: bool,
    names: str,
    quiet: bool,
    as_json: bool,
    save: str | None,
) -> None:
    """Play SCENARIO and show what became of the memory.

    SCENARIO is a file in TOML or JSON, or the word demo.

    \b
    Example: kmm run examples/first_dimm.toml --trace
    """
    if trace and quiet:
        raise click.UsageError("--trace with --quiet; allowed: one of them")
    _play(watch, load_scenario(scenario), trace, names, quiet, as_json, save)


@click.command()
@_TRACE
@_NAMES
@json_option
@_SAVE
@interruptible
def demo(watch: Watch, trace: bool, names: str, as_json: bool, save: str | None) -> None:
    """Show a DIMM that arrives, is used, and leaves.

    \b
    Example: kmm demo --trace
    """
    _play(watch, load_scenario(DEMO), trace, names, False, as_json, save)
