"""The command line: outcomes, exit codes, and mistakes without tracebacks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kmm.cli import main
from kmm.scenario import check_scenario
from tests.conftest import RECORDINGS

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.toml"))


def kmm(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def test_demo_tells_the_story_of_a_dimm() -> None:
    out = kmm("demo")
    assert out.exit_code == 0
    assert "uevent online /devices/system/memory/memory32 memory" in out.output
    assert "_OST 0x82" in out.output
    assert "uevent remove /devices/system/node/node1 node" in out.output
    assert "the machine now" in out.output


@pytest.mark.parametrize(
    ("names", "function"), [("6.1", "move_pfn_range_to_zone()"), ("old", "__add_zone()")]
)
def test_trace_prints_either_vocabulary(names: str, function: str) -> None:
    out = kmm("demo", "--trace", "--names", names)
    assert out.exit_code == 0
    assert function in out.output


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_every_example_runs(path: Path) -> None:
    out = kmm("run", path, "--quiet")
    assert out.exit_code == 0, out.output
    assert "zones and watermarks" in out.output


def test_replay_writes_the_recordings_layout(tmp_path: Path) -> None:
    out_file = tmp_path / "model.json"
    assert kmm("replay", RECORDINGS / "unaligned.json", "--out", out_file).exit_code == 0
    model = json.loads(out_file.read_text())
    real = json.loads((RECORDINGS / "unaligned.json").read_text())
    assert [s["step"] for s in model["steps"]] == [s["step"] for s in real["steps"]]


def test_verify_prints_a_table_and_exits_with_1_on_a_difference(tmp_path: Path) -> None:
    good = kmm("verify", RECORDINGS / "unaligned.json", RECORDINGS / "movable_node.json")
    assert good.exit_code == 0
    assert "call chain" in good.output
    broken = json.loads((RECORDINGS / "unaligned.json").read_text())
    broken["steps"][1]["uevents"] = ["add nothing"]
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(broken))
    bad = kmm("verify", path)
    assert bad.exit_code == 1
    assert "uevents: sequence" in bad.output


MACHINE = {"memory": "1G", "nodes": [{"cpus": "0", "memory": "1G"}, {}]}


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("[", "Invalid"),
        ([1], "not an object"),
        ({"machine": MACHINE}, "steps: None; allowed: a list of steps"),
        ({"machine": {"memory": "1X"}, "steps": []}, "machine.memory: '1X' is not a size"),
        ({"machine": {"memroy": 1}, "steps": []}, "machine.memroy: 1; no such field; allowed"),
        ({"machine": MACHINE, "steps": [{"op": "fly"}]}, "step 1.op: 'fly'; allowed: alloc"),
        ({"machine": MACHINE, "steps": [{"op": "unplug"}]}, "step 1.id: missing; allowed: text"),
        (
            {"machine": MACHINE, "steps": [{"op": "unplug", "id": "a", "x": 1}]},
            "step 1.x: 1; no such field",
        ),
        (
            {
                "machine": MACHINE,
                "steps": [{"op": "plug", "id": "a", "node": 2, "addr": 0, "size": "1G"}],
            },
            "step 1.node: 2; allowed: 0 to 1",
        ),
        (
            {"machine": MACHINE, "steps": [{"op": "alloc", "id": "a", "count": 1, "gfp": "GFP_X"}]},
            "step 1.gfp: 'GFP_X'; allowed: GFP_KERNEL",
        ),
    ],
)
def test_a_bad_scenario_is_one_clear_sentence(tmp_path: Path, scenario: object, words: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(scenario if isinstance(scenario, str) else json.dumps(scenario))
    out = kmm("run", path)
    assert out.exit_code == 2
    assert "Traceback" not in out.output
    assert "bad.json" in out.output or scenario == "["
    assert words in out.output or scenario == "["


@pytest.mark.parametrize(
    "args",
    [
        ("run", "missing.toml"),
        ("verify", "missing.json"),
        ("replay", "missing.json", "--out", "x"),
        ("run",),
        ("fly",),
    ],
)
def test_usage_errors_exit_with_2(args: tuple[str, ...]) -> None:
    out = kmm(*args)
    assert out.exit_code == 2
    assert "Traceback" not in out.output


def test_steps_that_are_refused_are_shown_and_do_not_end_the_run() -> None:
    from kmm.scenario import Player

    scenario = check_scenario(
        {
            "machine": MACHINE,
            "steps": [{"op": "unplug", "id": "none"}, {"op": "read", "path": "/proc/nothing"}],
        },
        "s",
    )
    player = Player(scenario)
    outcomes = [player.play(step) for step in scenario.steps]
    assert outcomes[0].error == "Device 'none' not found"
    assert outcomes[1].error.startswith("ENOENT")
    player.m.validate()
