"""What is kept of a run: changes only, equal things once, and a saved run is checked."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmm.errors import ConfigError
from kmm.report_data import (
    MOST_LINES,
    MOST_MOMENTS,
    RunRecorder,
    check_run,
    fold_calls,
    fold_lines,
)
from kmm.scenario import Player, Scenario, check_scenario
from kmm.trace_graph import spans
from tests.test_trace_graph import demo


def record(scenario: Scenario) -> tuple[dict[str, Any], Player]:
    player = Player(scenario)
    recorder = RunRecorder(player.m, scenario.title, len(scenario.steps))
    for number, step in enumerate(scenario.steps, 1):
        recorder.step(number, player.play(step, "timed"))
    player.m.validate()
    return recorder.data, player


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    return record(demo())[0]


def blocks_after(run: dict[str, Any], moment: int) -> dict[int, list[str]]:
    out: dict[int, list[str]] = {}
    for m in run["moments"][: moment + 1]:
        for first, count, code in m["changed"]:
            for block in range(first, first + count):
                if code < 0:
                    del out[block]
                else:
                    out[block] = run["legend"][code]
    return out


def test_the_changes_add_up_to_the_machine(run: dict[str, Any]) -> None:
    player = Player(demo())
    for number, step in enumerate(demo().steps, 1):
        player.play(step)
        shown = blocks_after(run, number)
        assert {i: b.state for i, b in player.m.memory_blocks.items()} == {
            i: what[0] for i, what in shown.items()
        }
        for i, block in player.m.memory_blocks.items():
            if block.zone is not None:
                assert shown[i][1] == block.zone.name
        zones = run["moments"][number]["zones"]
        for zone in player.m.all_zones():
            if zone.present_pages:
                kept = zones[f"node {zone.nid} {zone.name}"]
                assert kept["free"] == zone.nr_free_pages
                assert kept["low"] == zone.low_wmark_pages()
                sizes = [sum(n << o for o, n in enumerate(row)) for row in kept["blocks"].values()]
                assert sum(sizes) == zone.nr_free_pages
    assert blocks_after(run, 2)[32] == ["online", "Movable", "1"]
    assert blocks_after(run, 2)[34] == ["offline", "none", "1"]
    player.m.validate()


def test_a_refused_offline_tells_what_it_stumbled_over(run: dict[str, Any]) -> None:
    (attempt,) = run["steps"][5]["offline"]
    assert (attempt["first"], attempt["blocks"]) == (33, 1)
    assert attempt["error"].startswith("EBUSY")
    assert attempt["blocked"] == 0x108000
    assert attempt["counts"] == {"free": 32765, "stays": 3}
    (both,) = run["steps"][8]["offline"]
    assert (both["first"], both["blocks"], both["error"]) == (32, 2, "")


def test_lines_in_a_row_become_one() -> None:
    lines = [f"online /devices/system/memory/memory{i} memory" for i in range(32, 40)]
    assert fold_lines([*lines, "x 5"]) == [
        "online /devices/system/memory/memory32..39 memory (8 lines)",
        "x 5",
    ]
    assert fold_lines(["a 1 2", "a 1 3", "a 1 9"]) == ["a 1 2..3 (2 lines)", "a 1 9"]
    assert fold_lines(["same 1", "same 1"]) == ["same 1", "same 1"]
    assert fold_lines(["\x1b[2J"]) == ["\\x1b[2J"]


@given(st.lists(st.sampled_from(["a 1", "a 2", "a 3", "b", "a 03", "a 4 1"]), max_size=12))
def test_no_line_is_lost(lines: list[str]) -> None:
    counted = 0
    for line in fold_lines(lines):
        counted += int(line.rpartition("(")[2].split()[0]) if line.endswith(" lines)") else 1
    assert counted == len(lines)


def test_equal_calls_become_one_and_nothing_is_lost() -> None:
    calls = [[0, "a", 1], [1, "b", 2], [2, "c", 1], [1, "d", 1], [0, "a", 1], [1, "b", 1]]
    calls += [[2, "c", 3], [1, "d", 1], [0, "a", 1], [1, "d", 1]]
    found = spans(calls)
    first, other = fold_calls(found)
    assert (first[0], first[1], other[0], other[1]) == ("a", 2, "a", 1)
    assert [(n[0], n[1]) for n in first[5]] == [("b", 3), ("d", 2)]
    assert first[5][0][5][0][1] == 4
    assert first[2] + other[2] == sum(s.duration for s in found if s.depth == 0)


def test_a_long_run_keeps_fewer_moments() -> None:
    steps = [{"op": "read", "path": "/proc/buddyinfo"}] * (MOST_MOMENTS + 5)
    scenario = check_scenario({"machine": {}, "steps": steps}, "long")
    run = record(scenario)[0]
    shown = [m["step"] for m in run["moments"]]
    assert len(shown) <= MOST_MOMENTS + 1
    assert (shown[0], shown[-1]) == (0, len(steps))
    assert check_run(run, "long") == run


def test_of_many_lines_the_rest_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_LINES > 1000
    monkeypatch.setattr("kmm.report_data.MOST_LINES", 6)
    run = record(demo())[0]
    lines = [line for s in run["steps"] for line in (*s["uevents"], *s["log"])]
    assert sum("more lines" in line for line in lines) > 3
    assert len([line for line in lines if "more lines" not in line]) == 6


def test_a_saved_run_comes_back(run: dict[str, Any]) -> None:
    assert check_run(json.loads(json.dumps(run)), "run.json") == run


BREAK: dict[str, Any] = {
    "kmm_run": lambda r: r.update(kmm_run=7),
    "title": lambda r: r.update(title=3),
    "block_size": lambda r: r.update(block_size=0),
    "legend": lambda r: r["legend"].append(["online"]),
    "moments: none": lambda r: r["moments"].clear(),
    "moments 1: step": lambda r: r["moments"][1].update(step=99),
    "changed": lambda r: r["moments"][0]["changed"].append([0, 1, 99]),
    "free": lambda r: r["moments"][0]["zones"]["node 0 DMA"].update(free="1"),
    "blocks": lambda r: r["moments"][0]["zones"]["node 0 DMA"].update(blocks=None),
    "steps 1: text": lambda r: r["steps"][0].pop("text"),
    "steps 1: log": lambda r: r["steps"][0].update(log=[1]),
    "steps 6: offline: first": lambda r: r["steps"][5]["offline"][0].update(first=None),
    "steps 1: calls": lambda r: r["steps"][0]["calls"].append(["a", 1]),
}


@pytest.mark.parametrize("what", BREAK)
def test_a_broken_one_is_refused_by_name(run: dict[str, Any], what: str) -> None:
    broken = copy.deepcopy(run)
    BREAK[what](broken)
    with pytest.raises(ConfigError, match=f"run.json: .*{what}.*allowed"):
        check_run(broken, "run.json")
