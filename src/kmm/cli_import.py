"""``kmm import``: the twin of a real machine, and what its files did not tell."""

from __future__ import annotations

import json

import click

from kmm.errors import ConfigError, printable
from kmm.import_machine import Twin, as_json, import_machine


def summary(twin: Twin) -> str:
    """Return a machine in one line: nodes, memory, blocks."""
    m = twin.machine
    blocks = list(m.memory_blocks.values())
    offline = sum(b.state == "offline" for b in blocks)
    return (
        f"{len(m.n_memory)} nodes with memory of {len(m.nodes)}, {m.nr_cpus} CPUs, "
        f"{m.totalram_pages >> 8} MiB, {len(blocks)} memory blocks of {m.block_size >> 20} MiB, "
        f"{offline} offline"
    )


@click.command("import")
@click.argument("source", type=click.Path())
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="File to write.")
@click.option("--json", "as_json_", is_flag=True, help="Print the report as JSON.")
def import_(source: str, out: str | None, as_json_: bool) -> None:
    """Build the twin of a real machine from SOURCE, and say what was missing and assumed.

    SOURCE is a directory with copies of /proc and /sys (/ is this machine; as root, or some
    files cannot be read), an unpacked sosreport, a tar file of either, or a machine.json.

    Exits with 0 if all files were there and fit, with 1 if the machine was built with doubts
    (files that were missing, unreadable, or left out), with 2 if no machine can be built.

    \b
    Example: kmm import / -o machine.json
    """
    twin = import_machine(source)
    if out is not None:
        try:
            with open(out, "w", encoding="utf-8") as file:
                file.write(as_json(twin.collected))
        except OSError as e:
            raise ConfigError(f"{out}: {e.strerror}") from None
    if as_json_:
        click.echo(json.dumps({"machine": summary(twin), **twin.report.as_dict()}, indent=1))
    else:
        click.echo(summary(twin))
        for line in twin.report.lines():
            click.echo(printable(line))
        if out is not None:
            click.echo(printable(f"written: {out}"))
    if twin.report.doubts:
        raise SystemExit(1)
