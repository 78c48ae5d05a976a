"""``kmm stress``: thousands of random operations on a machine in use."""

from __future__ import annotations

import json

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
from kmm.params import parse_size
from kmm.stress import Stress
from kmm.wording import counted


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
@click.option("-o", "out", type=OutFile(), help="Scenario to write on failure.")
@json_option
@interruptible
def stress(
    watch: Watch,
    seed: int,
    size: str,
    used: str | None,
    operations: int,
    every: int,
    out: str | None,
    as_json: bool,
) -> None:
    """Plug, use, move and unplug memory at random, and recount everything.

    Exits with 1 on a failure, and writes a scenario that leads to it.  The seed repeats a run.

    \b
    Example: kmm stress --seed 7 --size 1T --used 256G --operations 1000
    """
    nbytes = parse_size(size, "--size")
    in_use = nbytes // 4 if used is None else parse_size(used, "--used")
    run = Stress(seed, nbytes, in_use)
    with watch.bar(operations, "operation") as done:
        failure = run.run(
            operations,
            every,
            lambda number: done(number, f"{counted(len(run.steps), 'step')} in all"),
        )
    if failure is not None:
        path = out or f"kmm-stress-{seed}.json"
        played = run.as_scenario(f"kmm stress, seed {seed}: {failure}")
        write_text(path, json.dumps(played, indent=1) + "\n")
        if as_json:
            echo_json({"seed": seed, "failure": str(failure), "scenario": path})
        raise fail(f"{failure}; kmm run {path} plays it")
    users = len(run.player.m.users)
    if as_json:
        echo_json({"seed": seed, "operations": operations, "refused": run.refused, "users": users})
    else:
        words = f"{counted(operations, 'operation')}, {run.refused} refused"
        echo(f"{words}, {counted(users, 'user')}: all adds up")
