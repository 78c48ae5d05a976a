"""``kmm export``: a machine's /proc and /sys tree as plain files."""

from __future__ import annotations

import json

import click

from kmm.errors import printable
from kmm.export import export_tar, export_tree
from kmm.machine_source import chosen_machine, machine_options


@click.command()
@click.argument("directory", required=False, type=click.Path())
@click.option("-o", "out", type=click.Path(dir_okay=False), help="Tar file to write instead.")
@machine_options
@click.option("--force", is_flag=True, help="Replace an earlier export.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def export(
    directory: str | None,
    out: str | None,
    scenario: str | None,
    source: str | None,
    steps: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write a machine's /proc and /sys tree as plain files to DIRECTORY, or to a tar file.

    The machine is a new one, or that of --scenario or --from.  Programs that take another root
    read the files as those of a real machine: lsmem --sysroot DIRECTORY.  Writing to them changes
    no machine.

    \b
    Example: kmm export tree --scenario examples/first_dimm.toml --steps 3
    """
    if (directory is None) == (out is None):
        raise click.UsageError("allowed: one of DIRECTORY and -o")
    m = chosen_machine(scenario, source, steps)
    if out is not None:
        place, done = out, export_tar(m, out, force)
    else:
        place = str(directory)
        done = export_tree(m, place, force)
    if as_json:
        click.echo(json.dumps({"path": place, **done.as_dict()}, indent=1))
    else:
        click.echo(
            printable(
                f"{place}: {done.files} files, {done.links} links, {done.directories} directories"
            )
        )
