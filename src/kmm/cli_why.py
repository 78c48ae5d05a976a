"""``kmm why``: whether a memory block could go offline, and what is in its way."""

from __future__ import annotations

import json

import click

from kmm.errors import ConfigError, KernelError, printable
from kmm.import_machine import is_machine
from kmm.offline_why import block_of, machine_of_files, machine_of_scenario, why_lines


@click.command()
@click.argument("block")
@click.option("--scenario", type=click.Path(dir_okay=False), help="Play this scenario first.")
@click.option(
    "--from",
    "source",
    type=click.Path(),
    help="What kmm import takes or has written (/ is this machine), or a recording.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=0),
    help="How many steps to play: of a scenario all by default, of a recording none.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def why(
    block: str, scenario: str | None, source: str | None, steps: int | None, as_json: bool
) -> None:
    """Say whether BLOCK (33, or memory33) could go offline, and what is in its way.

    Nothing is changed.  Exits with 0 if it could go now, with 1 if it could not, with 2 on a
    mistake in what was given.  Where reclaim, compaction or the like decides, the first line says
    "might go" or "might not go": the exit status is then the likelier answer, not a certain one.

    \b
    Example: kmm why 33 --scenario examples/first_dimm.toml --steps 3
    """
    if (scenario is None) == (source is None):
        raise click.UsageError("allowed: one of --scenario and --from")
    number = block_of(block)
    if scenario is not None:
        m = machine_of_scenario(scenario, steps)
    else:
        m = machine_of_files(str(source), steps)
    try:
        said = m.explain_offline(number)
    except KernelError as e:
        why_not = e.why.replace("block_id", "BLOCK", 1)
        if source is None or not is_machine(source):
            why_not += "; --steps says how many steps are played first, which may bring it"
        raise ConfigError(why_not) from None
    if as_json:
        click.echo(json.dumps(said.as_dict(), indent=1))
    else:
        for line in why_lines(said):
            click.echo(printable(line))
    if not said.can_go:
        raise SystemExit(1)
