"""``kmm replay`` and ``kmm verify``: recordings of a real kernel, played and compared."""

from __future__ import annotations

import json
from pathlib import Path

import click

from kmm.cli_frame import OutFile, Watch, echo, echo_json, interruptible, json_option, write_text
from kmm.data_files import load_data
from kmm.replay import replay as replay_recording
from kmm.verify import Score, compare
from kmm.wording import counted


@click.command()
@click.argument("recording", type=click.Path(dir_okay=False))
@click.option("-o", "--out", required=True, type=OutFile(), help="File to write.")
@json_option
@interruptible
def replay(watch: Watch, recording: str, out: str, as_json: bool) -> None:
    """Play RECORDING's steps and write what the model shows, in the recording's layout.

    \b
    Example: kmm replay tests/recordings/movable_node.json --out model.json
    """
    watch.where = f"in {recording}"
    model = replay_recording(load_data(recording), recording)
    write_text(out, json.dumps(model, indent=1) + "\n")
    if as_json:
        echo_json({"out": out, "steps": len(model["steps"])})
    else:
        echo(f"{out}: {counted(len(model['steps']), 'step')}")


@click.command()
@click.argument("recordings", nargs=-1, required=True, type=click.Path(dir_okay=False))
@click.option(
    "--show",
    "shown",
    type=click.IntRange(min=0),
    default=5,
    show_default=True,
    help="Differences to print.",
)
@json_option
@interruptible
def verify(watch: Watch, recordings: tuple[str, ...], shown: int, as_json: bool) -> None:
    """Replay RECORDINGS and print how many of the real kernel's facts agree.

    Exits with 1 if any does not.

    \b
    Example: kmm verify tests/recordings/veto.json tests/recordings/probe.json --show 20
    """
    total = Score()
    each: dict[str, list[int]] = {}
    with watch.bar(len(recordings), "recording") as done:
        for number, path in enumerate(recordings):
            done(number, path)
            data = load_data(path)
            score = compare(data, replay_recording(data, path))
            each[path] = [sum(score.good.values()), sum(score.total.values())]
            if not as_json:
                echo(f"{Path(path).stem:<20} {each[path][0]:7} / {each[path][1]:7}")
            score.differences = [f"{Path(path).stem}: {d}" for d in score.differences]
            total.add(score)
        done(len(recordings), "")
    if as_json:
        classes = {c: [total.good[c], total.total[c]] for c in sorted(total.total)}
        echo_json(
            {"recordings": each, "classes": classes, "differences": total.differences[:shown]}
        )
    else:
        click.echo("\n" + total.table())
        for difference in total.differences[:shown]:
            echo(difference)
    if not total.perfect:
        raise SystemExit(1)
