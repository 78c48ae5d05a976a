"""The ``kmm`` command."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from kmm.errors import ConfigError, ImpossibleState, KernelError, ValidationError, printable
from kmm.replay import replay as replay_recording
from kmm.scenario import Outcome, Player, Scenario, check_scenario, load_data, load_scenario
from kmm.verify import Score, compare
from kmm.views import call_tree, layers, show

try:
    import click
except ImportError:  # pragma: no cover - depends on how kmm was installed
    sys.exit("kmm: the command line needs click; install kmm[cli]")

from kmm.cli_export import export
from kmm.cli_mount import mount, shell_command
from kmm.cli_stress import INTERRUPTED, stress
from kmm.cli_why import why


def _fail(error: Exception) -> click.ClickException:
    return click.ClickException(printable(str(error)))


def _echo(text: str) -> None:
    """Print a line, whatever is in it."""
    click.echo(printable(text))


class _Interrupted(click.ClickException):
    exit_code = INTERRUPTED


class _Group(click.Group):
    """Turns kmm's own errors into one line and exit status 2, lost output into status 1.

    An interrupted command ends with a line and status 130.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            try:
                return super().main(*args, **kwargs)
            finally:
                sys.stdout.flush()
        except OSError as e:
            if isinstance(e, KernelError):
                raise
            # What is left in the buffer has to go somewhere when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            if e.errno != errno.EPIPE:
                click.echo(f"Error: standard output: {e.strerror}", err=True)
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _Interrupted("interrupted") from None
        except ConfigError as e:
            raise click.UsageError(printable(str(e))) from None
        except (ValidationError, ImpossibleState) as e:
            raise _fail(e) from None
        except MemoryError as e:
            raise click.ClickException(str(e) or "this host has not enough memory") from None


@click.group(cls=_Group)
@click.version_option(package_name="kmm")
def main() -> None:
    """A machine you can plug memory into, true to Linux 6.1.

    \b
    Example: kmm demo
    """


def _print_outcome(number: int, out: Outcome, trace: bool, names: str) -> None:
    _echo(f"step {number}: {out.text}")
    result = f"refused: {out.error}" if out.error else out.output or "done"
    for line in result.split("\n"):
        _echo(f"    {line}")
    for line in out.uevents:
        _echo(f"    uevent {line}")
    for line in out.log:
        _echo(f"    kernel {line}")
    if trace and out.calls:
        click.echo(call_tree(out.calls, names))


def _play_step(player: Player, number: int, step: Mapping[str, Any], trace: bool) -> Outcome:
    try:
        return player.play(step, trace)
    except (ConfigError, ValidationError, ImpossibleState, click.ClickException):
        raise
    except MemoryError as e:
        why = str(e) or "this host has not enough memory"
        raise click.ClickException(printable(f"step {number}: {why}")) from None
    except Exception as e:
        # A fault of kmm's, or of what extends it; the machine may be half changed.
        why = f"{type(e).__name__}: {e}"
        raise click.ClickException(printable(f"step {number}: kmm failed: {why}")) from e


def _play(scenario: Scenario, trace: bool, names: str, quiet: bool) -> None:
    player = Player(scenario)
    before = now = layers(player.m)
    if not quiet:
        _echo(scenario.title)
    for number, step in enumerate(scenario.steps, 1):
        before = now
        out = _play_step(player, number, step, trace)
        now = layers(player.m)
        if not quiet:
            _print_outcome(number, out, trace or bool(step.get("trace")), names)
    player.m.validate()
    if not quiet:
        click.echo("\nthe machine now (* new or changed, - gone since the step before)")
    click.echo(show(now, before))


_TRACE = click.option("--trace", is_flag=True, help="Print the kernel functions of every step.")
_NAMES = click.option(
    "--names",
    type=click.Choice(["old", "6.1"]),
    default="6.1",
    show_default=True,
    help="Vocabulary of the call chains: older kernels' names, or 6.1's.",
)


@main.command()
@click.argument("scenario", type=click.Path(dir_okay=False))
@_TRACE
@_NAMES
@click.option("--quiet", is_flag=True, help="Print the final view only.")
def run(scenario: str, trace: bool, names: str, quiet: bool) -> None:
    """Play SCENARIO (TOML or JSON) and show what became of the memory.

    \b
    Example: kmm run examples/first_dimm.toml --trace
    """
    if trace and quiet:
        raise click.UsageError("--trace with --quiet; allowed: one of them")
    _play(load_scenario(scenario), trace, names, quiet)


@main.command()
@_TRACE
@_NAMES
def demo(trace: bool, names: str) -> None:
    """Show a DIMM that arrives, is used, and leaves.

    \b
    Example: kmm demo --trace
    """
    import tomllib

    text = files("kmm").joinpath("scenarios/demo.toml").read_text(encoding="utf-8")
    _play(check_scenario(tomllib.loads(text), "demo.toml"), trace, names, False)


@main.command()
@click.argument("recording", type=click.Path(dir_okay=False))
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="File to write.")
def replay(recording: str, out: str) -> None:
    """Play RECORDING's steps and write what the model shows, in the recording's layout.

    \b
    Example: kmm replay tests/recordings/movable_node.json --out model.json
    """
    model = replay_recording(load_data(recording), recording)
    try:
        Path(out).write_text(json.dumps(model, indent=1) + "\n", encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"{out}: {e.strerror}") from None
    click.echo(f"{out}: {len(model['steps'])} steps")


@main.command()
@click.argument("recordings", nargs=-1, required=True, type=click.Path(dir_okay=False))
@click.option("--show", "shown", default=5, show_default=True, help="Differences to print.")
def verify(recordings: tuple[str, ...], shown: int) -> None:
    """Replay RECORDINGS and print how many of the real kernel's facts agree.

    Exits with 1 if any does not.

    \b
    Example: kmm verify tests/recordings/*.json
    """
    total = Score()
    for path in recordings:
        data = load_data(path)
        score = compare(data, replay_recording(data, path))
        good, all_ = sum(score.good.values()), sum(score.total.values())
        _echo(f"{Path(path).stem:<20} {good:7} / {all_:7}")
        score.differences = [f"{Path(path).stem}: {d}" for d in score.differences]
        total.add(score)
    click.echo("\n" + total.table())
    for difference in total.differences[:shown]:
        _echo(difference)
    if not total.perfect:
        raise SystemExit(1)


main.add_command(export)
main.add_command(mount)
main.add_command(shell_command)
main.add_command(stress)
main.add_command(why)

if __name__ == "__main__":
    main()
