"""``kmm trace``: the kernel functions of a scenario as a tree with durations, or for viewers."""

from __future__ import annotations

import io

import click

from kmm.cli_frame import OutFile, Watch, echo, echo_json, interruptible, json_option, write_text
from kmm.cli_run import play_step
from kmm.scenario import Player, Scenario, describe, load_scenario
from kmm.trace_export import write_chrome, write_ftrace, write_graph
from kmm.trace_graph import TraceClock, TracedStep
from kmm.wording import counted


def _play(watch: Watch, scenario: Scenario) -> list[TracedStep]:
    """Play all steps and return them in virtual time."""
    player, clock = Player(scenario), TraceClock()
    steps = []
    with watch.bar(len(scenario.steps), "step") as done:
        for number, step in enumerate(scenario.steps, 1):
            done(number - 1, describe(step))
            out = play_step(player, number, step, "timed")
            assert out.timeline is not None  # it was asked for
            traced = clock.step(number, out.text, out.calls, out.timeline)
            traced.error = out.error
            steps.append(traced)
        done(len(scenario.steps), "the final recount")
        player.m.validate()
    return steps


@click.command()
@click.argument("scenario", type=click.Path(dir_okay=False))
@click.option(
    "--format",
    "kind",
    type=click.Choice(["graph", "perfetto", "ftrace"]),
    default="graph",
    show_default=True,
    help="A tree as of the function_graph tracer; JSON for Perfetto and chrome://tracing; text as"
    " of ftrace's function tracer.",
)
@click.option("-o", "out", type=OutFile(), help="File to write; else printed.")
@click.option(
    "--names",
    type=click.Choice(["old", "6.1"]),
    default="6.1",
    show_default=True,
    help="Vocabulary: older kernels' names, or 6.1's.",
)
@json_option
@interruptible
def trace(
    watch: Watch, scenario: str, kind: str, out: str | None, names: str, as_json: bool
) -> None:
    """Play SCENARIO and show which kernel functions it ran, with virtual durations.

    SCENARIO is a file in TOML or JSON, or the word demo.

    Durations are estimates by the work that a call does, the same on every host; waiting is by
    the machine's own clock.

    \b
    Example: kmm trace examples/first_dimm.toml --format perfetto -o trace.json
    """
    if as_json and out is None and kind != "perfetto":
        raise click.UsageError("--json without -o; allowed: with -o, or --format perfetto")
    loaded = load_scenario(scenario)
    steps = _play(watch, loaded)
    text = io.StringIO()
    if kind == "perfetto":
        write_chrome(steps, text, loaded.title, names)
    elif kind == "ftrace":
        write_ftrace(steps, text, names)
    else:
        write_graph(steps, text, names)
    if out is None:
        click.echo(text.getvalue(), nl=False)
        return
    write_text(out, text.getvalue())
    calls = sum(span.times for step in steps for span in step.spans)
    end = steps[-1].end if steps else 0
    if as_json:
        echo_json({"out": out, "steps": len(steps), "calls": calls, "end_ns": end})
    else:
        words = f"{counted(len(steps), 'step')}, {counted(calls, 'call')}"
        echo(f"{out}: {words}, {end / 1e6:.3f} ms of virtual time")
