"""``kmm import``: the twin of a real machine, and what its files did not tell."""

from __future__ import annotations

import click

from kmm.cli_frame import OutFile, Watch, echo, echo_json, interruptible, json_option, write_text
from kmm.import_machine import Twin, import_machine
from kmm.import_machine import as_json as machine_json
from kmm.params import PAGE_SHIFT
from kmm.wording import about, counted, sized


def summary(twin: Twin) -> str:
    """Return a machine in one line: nodes, memory, blocks."""
    m = twin.machine
    blocks = list(m.memory_blocks.values())
    offline = sum(b.state == "offline" for b in blocks)
    return (
        f"{counted(len(m.nodes), 'node')}, {len(m.n_memory)} with memory, "
        f"{counted(m.nr_cpus, 'CPU')}, {about(m.totalram_pages << PAGE_SHIFT)}, "
        f"{counted(len(blocks), f'memory block of {sized(m.block_size)}')}, {offline} offline"
    )


@click.command("import")
@click.argument("source", type=click.Path())
@click.option("-o", "--out", type=OutFile(), help="File to write.")
@json_option
@interruptible
def import_(watch: Watch, source: str, out: str | None, as_json: bool) -> None:
    """Build the twin of a real machine from SOURCE, and say what was missing and assumed.

    SOURCE is a directory with copies of /proc and /sys (/ is this machine; as root, or some
    files cannot be read), an unpacked sosreport, a tar file of either, or a machine.json.

    Exits with 0 if all files were there and fit, with 1 if the machine was built with doubts
    (files that were missing, unreadable, or left out), with 2 if no machine can be built.

    \b
    Example: kmm import / -o machine.json
    """
    watch.where = f"in {source}"
    twin = import_machine(source, watch.bar)
    if out is not None:
        write_text(out, machine_json(twin.collected))
    if as_json:
        echo_json({"machine": summary(twin), **twin.report.as_dict()})
    else:
        echo(summary(twin))
        for line in twin.report.lines():
            echo(line)
        if out is not None:
            echo(f"written: {out}")
    if twin.report.doubts:
        raise SystemExit(1)
