"""``kmm why``: whether a memory block could go offline, and what is in its way."""

from __future__ import annotations

import click

from kmm.cli_frame import Watch, echo, echo_json, interruptible, json_option, machine_options
from kmm.errors import ConfigError, KernelError
from kmm.import_machine import is_machine
from kmm.machine_source import chosen_machine
from kmm.offline_why import block_of, why_lines


@click.command()
@click.argument("block")
@machine_options
@json_option
@interruptible
def why(
    watch: Watch,
    block: str,
    scenario: str | None,
    source: str | None,
    steps: int | None,
    as_json: bool,
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
    watch.where = f"in {scenario or source}"
    m = chosen_machine(scenario, source, steps)
    try:
        said = m.explain_offline(number)
    except KernelError as e:
        why_not = e.why.replace("block_id", "BLOCK", 1)
        if source is None or not is_machine(source):
            why_not += "; --steps says how many steps are played first, which may bring it"
        raise ConfigError(why_not) from None
    if as_json:
        echo_json(said.as_dict())
    else:
        for line in why_lines(said):
            echo(line)
    if not said.can_go:
        raise SystemExit(1)
