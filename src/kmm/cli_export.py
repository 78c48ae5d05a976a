"""``kmm export``: a machine's /proc and /sys tree as plain files."""

from __future__ import annotations

import click

from kmm.cli_frame import (
    OutFile,
    Watch,
    echo,
    echo_json,
    interruptible,
    json_option,
    machine_options,
)
from kmm.export import export_tar, export_tree
from kmm.machine_source import chosen_machine
from kmm.wording import counted


@click.command()
@click.argument("directory", required=False, type=click.Path())
@click.option("-o", "out", type=OutFile(), help="Tar file to write instead.")
@machine_options
@click.option("--force", is_flag=True, help="Replace an earlier export.")
@json_option
@interruptible
def export(
    watch: Watch,
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
    watch.where = f"in {scenario or source}" if scenario or source else ""
    m = chosen_machine(scenario, source, steps)
    watch.where = f"writing {out or directory}"
    if out is not None:
        place, done = out, export_tar(m, out, force, watch.bar)
    else:
        place = str(directory)
        done = export_tree(m, place, force, watch.bar)
    if as_json:
        echo_json({"path": place, **done.as_dict()})
    else:
        echo(
            f"{place}: {counted(done.files, 'file')}, {counted(done.links, 'link')}, "
            f"{counted(done.directories, 'directory')}"
        )
