"""Virtual durations: they add up, cost nothing where nobody traces, and read as ftrace prints."""

from __future__ import annotations

import re
import tomllib
from importlib.resources import files

import pytest

from kmm.scenario import Player, Scenario, check_scenario
from kmm.symbols import SYMBOLS
from kmm.trace import Kprobes
from kmm.trace_costs import COSTS, DEFAULT, cost
from kmm.trace_graph import GRAPH_HEAD, Span, Timeline, TraceClock, TracedStep, graph_lines, spans


def demo() -> Scenario:
    text = files("kmm").joinpath("scenarios/demo.toml").read_text(encoding="utf-8")
    return check_scenario(tomllib.loads(text), "demo.toml")


def traced(scenario: Scenario) -> list[TracedStep]:
    player, clock = Player(scenario), TraceClock()
    steps = []
    for number, step in enumerate(scenario.steps, 1):
        out = player.play(step, "timed")
        assert out.timeline is not None
        steps.append(clock.step(number, out.text, out.calls, out.timeline))
        steps[-1].error = out.error
    player.m.validate()
    return steps


@pytest.fixture(scope="module")
def steps() -> list[TracedStep]:
    return traced(demo())


def parents(found: list[Span]) -> list[Span | None]:
    above: list[Span] = []
    out: list[Span | None] = []
    for span in found:
        while above and above[-1].depth >= span.depth:
            above.pop()
        out.append(above[-1] if above else None)
        above.append(span)
    return out


def test_calls_lie_inside_their_caller_and_behind_each_other(steps: list[TracedStep]) -> None:
    last: dict[int, int] = {}
    for step in steps:
        assert step.start == (steps[step.number - 2].end if step.number > 1 else step.start)
        for span, parent in zip(step.spans, parents(step.spans), strict=True):
            assert span.duration > 0
            assert step.start <= span.start <= span.end <= step.end
            if parent is not None:
                assert parent.start <= span.start
                assert span.end <= parent.end
            before = last.get(id(parent) if parent is not None else -1, 0)
            assert span.start >= before
            last[id(parent) if parent is not None else -1] = span.end


def test_a_memory_group_is_not_taken_for_a_node() -> None:
    plugs = [
        {"op": "plug", "id": f"d{i}", "node": 0, "addr": (4 << 30) + (i << 30), "size": "1G"}
        for i in range(3)
    ]
    scenario = check_scenario({"machine": {"maxmem": "16G"}, "steps": plugs}, "three")
    for step in traced(scenario):
        adding = [s for s in step.spans if s.name in ("__add_memory", "add_memory_resource")]
        assert [s.subjects for s in adding] == [(("node", 0),)] * 2


def test_durations_are_costs_added_up(steps: list[TracedStep]) -> None:
    for step in steps:
        costs = sum(cost(s.name, s.times, s.pages) for s in step.spans)
        assert step.end - step.start == costs


def test_a_call_knows_how_much_it_was_about(steps: list[TracedStep]) -> None:
    (init,) = [s for s in steps[1].spans if s.name == "memmap_init_range"]
    assert init.pages == 32768
    assert ("zone", "node 1 Movable") in init.subjects
    (mapping,) = [s for s in steps[0].spans if s.name == "init_memory_mapping"]
    assert mapping.pages == 512 << 8
    assert any(("DIMM", "dimm1") in s.subjects for s in steps[0].spans)
    (refused,) = [s for s in steps[5].spans if s.name == "offline_pages"]
    assert "unmovable" in refused.error


def test_twice_the_pages_cost_more_and_the_same_run_the_same(steps: list[TracedStep]) -> None:
    again = traced(demo())
    assert [s.spans for s in again] == [s.spans for s in steps]
    for name, (own, unit, each) in COSTS.items():
        assert own > 0
        if each:
            assert cost(name, 1, 2 * unit) == cost(name, 1, unit) + each
    assert cost("no_such_function", 3, 100) == 3 * DEFAULT


def test_costs_are_of_functions_that_there_are() -> None:
    names = {symbol.name for symbol in SYMBOLS}
    assert not set(COSTS) - names


def test_waiting_counts_by_the_clock() -> None:
    player = Player(demo())
    for step in demo().steps[:2]:
        player.play(step)
    m = player.m
    timeline = Timeline(m)
    probes = Kprobes(True)
    probes.enter("offline_pages")
    mark = timeline.begin(0, len, ([],), {})
    m.clock.advance(7_000_000)
    timeline.end(mark, None)
    timeline.finish()
    (span,) = spans(probes.calls, timeline)
    assert span.duration == cost("offline_pages", 1, 0) + 7_000_000
    m.validate()


def test_counters_follow_what_happened(steps: list[TracedStep]) -> None:
    online = steps[1].samples
    assert online[0][0] == steps[1].start
    assert "node 1 Movable" not in online[0][1].zones
    free, present, managed = online[-1][1].zones["node 1 Movable"]
    assert (present, managed) == (32768, 32768)
    assert 32700 < free <= 32768
    times = [when for when, _ in online]
    assert times == sorted(times)


LINE = re.compile(
    r"^ 0\) (?:[ +!#*@$] [0-9.]{5,} us {1,5}| {14})\|  ((?:  )*)(\w+\(\)(?:;| \{)|\})"
)


def test_the_tree_reads_as_function_graph_prints_it(steps: list[TracedStep]) -> None:
    assert "FUNCTION CALLS" in GRAPH_HEAD
    depth = 0
    for step in steps:
        for line in graph_lines(step.spans):
            found = LINE.match(line)
            assert found is not None, line
            assert line.index("|") == 18
            depth -= found[2] == "}"
            assert len(found[1]) == 2 * depth
            depth += found[2].endswith("{")
        assert depth == 0


@pytest.mark.parametrize(
    ("ns", "column"),
    [
        (127, "  0.127 us    "),
        (12_345, "+ 12.345 us   "),
        (222_123, "! 222.123 us  "),
        (1_234_567, "# 1234.567 us "),
        (12_345_678, "* 12345.67 us "),
        (123_456_789, "@ 123456.7 us "),
        (1_234_567_890, "$ 1234567 us  "),
    ],
)
def test_durations_are_aligned_as_by_the_kernel(ns: int, column: str) -> None:
    (line,) = graph_lines([Span(0, "online_pages", 1, 0, ns)])
    assert line == f" 0) {column}|  online_pages();"


def test_without_timing_calls_are_recorded_as_ever() -> None:
    timed, plain = Player(demo()), Player(demo())
    for step in demo().steps:
        a, b = timed.play(step, "timed"), plain.play(step, True)
        assert b.timeline is None
        assert a.calls == b.calls
        assert (a.log, a.uevents, a.error) == (b.log, b.uevents, b.error)
    assert timed.m.clock.now == plain.m.clock.now
    timed.m.validate()
