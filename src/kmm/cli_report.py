"""``kmm report``: a run as one page for a browser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from kmm.cli_frame import OutFile, Watch, echo, echo_json, interruptible, json_option, write_text
from kmm.cli_run import play_for_report
from kmm.data_files import load_data
from kmm.report_data import check_run
from kmm.report_html import charting_library, report_html
from kmm.scenario import DEMO, check_scenario, load_scenario
from kmm.wording import counted


def _run_of(watch: Watch, path: str) -> dict[str, Any]:
    """Return a saved run, or the one of a scenario, which is played now."""
    if path == DEMO:
        return play_for_report(watch, load_scenario(DEMO))
    watch.where = f"in {path}"
    data = load_data(path)
    if isinstance(data, Mapping) and "kmm_run" in data:
        return check_run(data, path)
    return play_for_report(watch, check_scenario(data, path))


@click.command()
@click.argument("run", type=click.Path(dir_okay=False))
@click.option("-o", "out", required=True, type=OutFile(), help="File to write.")
@json_option
@interruptible
def report(watch: Watch, run: str, out: str, as_json: bool) -> None:
    """Write a page that shows RUN step by step, for any browser and without a network.

    RUN is a scenario, which is played, a run that was saved (kmm run --save), or the word demo.

    \b
    Example: kmm report examples/first_dimm.toml -o report.html
    """
    watch.where = "before the first step"
    library = charting_library()
    data = _run_of(watch, run)
    watch.where = f"writing {out}"
    text = report_html(data, library)
    write_text(out, text)
    if as_json:
        echo_json({"out": out, "steps": len(data["steps"]), "bytes": len(text.encode())})
    else:
        echo(f"{out}: {counted(len(data['steps']), 'step')}, {len(text.encode()) / 1e6:.1f} MB")
