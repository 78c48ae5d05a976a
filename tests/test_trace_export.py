"""Chrome trace JSON has the fields that its format asks for; ftrace text its columns."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kmm.cli import main

EXAMPLE = Path(__file__).parent.parent / "src/kmm/scenarios/demo.toml"


def kmm(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture(scope="module")
def trace() -> dict[str, Any]:
    out = kmm("trace", EXAMPLE, "--format", "perfetto")
    assert out.exit_code == 0, out.output
    data = json.loads(out.output)
    assert isinstance(data, dict)
    return data


def test_every_event_has_the_fields_of_its_phase(trace: dict[str, Any]) -> None:
    assert trace["displayTimeUnit"] in ("ms", "ns")
    assert "estimated" in trace["otherData"]["clock"]
    phases = set()
    for event in trace["traceEvents"]:
        phases.add(event["ph"])
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert event["ts"] >= 0
        assert isinstance(event["args"], dict)
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert isinstance(event["tid"], int)
        elif event["ph"] == "C":
            assert all(isinstance(v, int) for v in event["args"].values())
        else:
            assert event["name"].startswith(("process_", "thread_"))
    assert phases == {"M", "X", "C"}


def test_times_only_grow_and_events_of_a_track_are_nested(trace: dict[str, Any]) -> None:
    last = 0.0
    open_: dict[tuple[int, int], list[float]] = defaultdict(list)
    for event in trace["traceEvents"]:
        assert event["ts"] >= last
        last = event["ts"]
        if event["ph"] != "X":
            continue
        stack = open_[event["pid"], event["tid"]]
        while stack and stack[-1] <= event["ts"] + 1e-9:
            stack.pop()
        end = event["ts"] + event["dur"]
        assert not stack or end <= stack[-1] + 1e-9, event
        stack.append(end)


def test_nodes_zones_and_dimms_have_named_tracks_of_their_own(trace: dict[str, Any]) -> None:
    names, processes = {}, {}
    for event in trace["traceEvents"]:
        if event["name"] == "thread_name":
            names[event["pid"], event["tid"]] = event["args"]["name"]
        if event["name"] == "process_name":
            processes[event["pid"]] = event["args"]["name"]
    assert len(set(names)) == len(names)
    shown = {(processes[pid], name) for (pid, _), name in names.items()}
    assert shown >= {
        ("kernel", "steps"),
        ("kernel", "CPU 0"),
        ("DIMMs", "DIMM dimm1"),
        ("node 1", "node 1"),
        ("node 1", "zone Movable"),
        ("node 1", "zone Normal"),
        ("node 0", "zone DMA32"),
    }
    used = {(e["pid"], e["tid"]) for e in trace["traceEvents"] if e["ph"] == "X"}
    assert used <= set(names)
    assert {names[t] for t in used} >= {"DIMM dimm1", "zone Movable", "CPU 0", "steps"}


def test_counters_tell_free_present_and_managed_pages(trace: dict[str, Any]) -> None:
    values: dict[str, list[int]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "C":
            values[event["name"]].append(event["args"]["pages"])
    for which in ("free", "present", "managed"):
        pages = values[f"node 1 Movable {which} pages"]
        assert max(pages) <= 32768
        assert max(pages) > 32000
        assert pages[-1] == 0  # the DIMM is gone
    assert values["node 0 DMA32 present pages"][0] == 258016
    for which in ("free", "present", "managed"):
        parts = [values[f"node 1 {zone} {which} pages"] for zone in ("Movable", "Normal")]
        assert max(values[f"node 1 {which} pages"]) == max(map(sum, zip(*parts, strict=False)))
    assert values["node 0 present pages"][0] == 258016 + 3998
    # At both ends of each step: it is there from the first one's end on, until the last one's.
    online = [n >> 15 for n in values["DIMM dimm1 online pages"]]
    assert online == [0, 0, 1, 1, *[2] * 12, 0]


ENTRY = re.compile(r"^ {11}<\.\.\.>-(\d+) +\[000\] \.{5} +(\d+\.\d{6}): (\w+) <-(\w+)$")


def test_a_counter_has_one_process_and_one_value_at_a_time(trace: dict[str, Any]) -> None:
    processes = defaultdict(set)
    for event in trace["traceEvents"]:
        if event["ph"] == "C":
            processes[event["name"]].add(event["pid"])
            assert list(event["args"]) == ["pages"]
    assert {len(pids) for pids in processes.values()} == {1}
    assert {name.rpartition(" ")[0].rpartition(" ")[2] for name in processes} == {
        *("free", "present", "managed", "online")
    }


def test_ftrace_text_has_a_line_for_each_call() -> None:
    text = kmm("trace", EXAMPLE, "--format", "ftrace").output
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert head[0] == "# tracer: function"
    assert "TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION" in head[-2]
    counted = re.search(r"entries-in-buffer/entries-written: (\d+)/(\d+) +#P:1", text)
    assert counted is not None
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(lines) == int(counted[1]) == int(counted[2])
    column = head[-1].rindex("|")
    last = 0.0
    for line in lines:
        entry = ENTRY.match(line)
        assert entry is not None, line
        assert float(entry[2]) >= last
        last = float(entry[2])
        assert abs(line.index(entry[3] + " <-") - column) <= 8
    assert sum("generic_online_page <-online_pages_range" in line for line in lines) >= 64


def test_the_old_names_and_the_file(tmp_path: Path) -> None:
    out = tmp_path / "graph.txt"
    said = kmm("trace", EXAMPLE, "-o", out, "--names", "old")
    assert said.exit_code == 0, said.output
    assert "9 steps" in said.output
    assert "__add_zone();" in out.read_text() or "__add_zone() {" in out.read_text()
    said = kmm("trace", EXAMPLE, "-o", out, "--json")
    assert json.loads(said.output)["steps"] == 9


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    assert kmm("trace", EXAMPLE, "--json").exit_code == 2
    assert kmm("trace", tmp_path / "none.toml").exit_code == 2
    bad = kmm("trace", EXAMPLE, "-o", tmp_path / "no" / "dir")
    assert bad.exit_code == 2
    assert "No such file or directory" in bad.output
