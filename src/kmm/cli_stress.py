"""``kmm stress``: thousands of random operations on a machine in use."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from kmm.errors import printable
from kmm.params import parse_size
from kmm.stress import Failure, Stress

INTERRUPTED = 130  # as a shell has it of a program that SIGINT ended


@click.command()
@click.option("--seed", type=click.IntRange(0, (1 << 64) - 1), default=0, show_default=True)
@click.option("--size", default="8G", show_default=True, help="Of the machine, half in DIMMs.")
@click.option("--used", help="How much is in use; a quarter of the size by default.")
@click.option("--operations", type=click.IntRange(0), default=300, show_default=True)
@click.option(
    "--every",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="After how many operations everything is recounted.",
)
@click.option("-o", "out", type=click.Path(dir_okay=False), help="Scenario to write on failure.")
def stress(
    seed: int, size: str, used: str | None, operations: int, every: int, out: str | None
) -> None:
    """Plug, use, move and unplug memory at random, and recount everything.

    Exits with 1 on a failure, and writes a scenario that leads to it.  The seed repeats a run.

    \b
    Example: kmm stress --seed 7 --size 1T --used 256G --operations 1000
    """
    nbytes = parse_size(size, "--size")
    in_use = nbytes // 4 if used is None else parse_size(used, "--used")
    run = Stress(seed, nbytes, in_use)
    try:
        failure = _with_bar(run, operations, every)
    except KeyboardInterrupt:
        done = f"{run.operations} of {operations} operations ({len(run.steps)} steps in all)"
        click.echo(f"interrupted after {done}", err=True)
        raise SystemExit(INTERRUPTED) from None
    if failure is not None:
        path = out or f"kmm-stress-{seed}.json"
        run.write_scenario(path, f"kmm stress, seed {seed}: {failure}")
        raise click.ClickException(printable(f"{failure}; kmm run {path} plays it"))
    users = len(run.player.m.users)
    click.echo(f"{operations} operations, {run.refused} refused, {users} users: all adds up")


def _with_bar(run: Stress, operations: int, every: int) -> Failure | None:
    if not sys.stderr.isatty():
        return run.run(operations, every)
    bar: Any = click.progressbar(length=operations, label="stress", file=sys.stderr)
    with bar:
        return run.run(operations, every, _shown_by(bar))


def _shown_by(bar: Any) -> Callable[[int], None]:
    return lambda done: bar.update(done - bar.pos)
