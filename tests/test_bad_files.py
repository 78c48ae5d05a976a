"""Files with something wrong anywhere in them: one clear message, never a traceback."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kmm import ConfigError, Machine
from kmm.cli import main
from tests.conftest import recording

WRONG: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1.5,
    1 << 31,
    10**15,
    1 << 70,
    10**30,
    "",
    "x",
    "\n",
    "9" * 5000,
    "Node 0, zone   Normal",
    "x" * 300,
    [],
    [5],
    {},
    {"op": "boot"},
    [[1, 2, 3]],
)
SCENARIO: dict[str, Any] = {
    "title": "a DIMM",
    "machine": {
        "memory": "256M",
        "maxmem": "2G",
        "slots": 2,
        "cpus": 2,
        "nodes": [{"cpus": "0-1", "memory": "256M"}, {}],
        "distances": [[10, 20], [20, 10]],
        "cmdline": "memhp_default_state=offline",
        "seed": 1,
    },
    "steps": [
        {"op": "plug", "id": "a", "node": 1, "addr": "4G", "size": "128M", "trace": True},
        {"op": "write", "path": "/sys/devices/system/memory/memory32/state", "value": "online"},
        {"op": "read", "path": "/proc/buddyinfo"},
        {"op": "alloc", "id": "x", "count": 4, "order": 1, "gfp": "GFP_KERNEL", "node": 1},
        {"op": "pages", "pfn": 1048576, "count": 16},
        {"op": "free", "id": "x"},
        {"op": "sh", "line": "true"},
        {"op": "unplug", "id": "a"},
    ],
}


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of nested data."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in list(items):
        yield data, key
        if isinstance(value, dict | list):
            yield from places(value)


def spoil(draw: Any, data: Any) -> Any:
    """A copy of data with a value replaced or deleted, or a word of a text."""
    data = copy.deepcopy(data)
    container, key = draw(st.sampled_from(list(places(data))))
    value = container[key]
    way = draw(st.sampled_from(["replace", "delete", "word", "line"]))
    if way == "delete":
        del container[key]
    elif way == "word" and isinstance(value, str) and value.split(" ")[0] != value:
        words = value.split(" ")
        at = draw(st.integers(0, len(words) - 1))
        words[at] = str(draw(st.sampled_from(WRONG[:-5])))
        container[key] = " ".join(words)
    elif way == "line" and isinstance(value, str) and "\n" in value:
        lines = value.split("\n")
        at = draw(st.integers(0, len(lines) - 1))
        lines[at : at + 1] = draw(st.sampled_from([[], ["x"], [lines[at], lines[at]]]))
        container[key] = "\n".join(lines)
    else:
        container[key] = draw(st.sampled_from(WRONG))
    return data


def kmm(command: str, data: Any, folder: Path) -> None:
    """Run a command on data and check how it ends."""
    path = folder / "bad.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    more = ["--out", str(folder / "out.json")] if command == "replay" else []
    result = CliRunner().invoke(main, [command, str(path), *more])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 1, 2)
    if result.exit_code == 2:
        message = result.output.split("Error: ")[1]
        assert "bad.json" in message
        assert len(message) < 800


quick = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def small_recording() -> dict[str, Any]:
    real = recording("unaligned")
    real["classes"] = ["errors", "iomem", "uevents", "call chain"]
    real["score_until"] = len(real["steps"])
    real["unstable"] = [[1, "errors", "rc"]]
    return real


@quick
@given(st.data())
def test_run_with_a_spoilt_scenario(tmp_path: Path, data: st.DataObject) -> None:
    kmm("run", spoil(data.draw, SCENARIO), tmp_path)


@quick
@given(st.data(), st.sampled_from(["verify", "replay"]))
def test_verify_and_replay_with_a_spoilt_recording(
    tmp_path: Path, data: st.DataObject, command: str
) -> None:
    kmm(command, spoil(data.draw, small_recording()), tmp_path)


@quick
@given(st.data(), st.sampled_from([True, False]))
def test_a_machine_from_spoilt_files(data: st.DataObject, described: bool) -> None:
    real = recording("movable_node")
    files = spoil(data.draw, real["steps"][0]["files"])
    try:
        m = Machine.from_files(files, real["machine"] if described else None)
    except ConfigError as e:
        assert len(str(e)) < 400
        return
    m.validate()


def step(**fields: Any) -> dict[str, Any]:
    return {**SCENARIO, "steps": [fields]}


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"title": ' + "9" * 5000 + "}", "4300 digits"),
        ('{"title": "\\ud800", "steps": []}', "surrogates not allowed"),
        (step(op=["plug"]), "step 1.op: ['plug']; allowed: alloc, balloon, boot"),
        (step(op={"a": 1}), "step 1.op: {'a': 1}; allowed: alloc, balloon, boot"),
        (step(op="pages", pfn=1 << 70, count=1), "step 1.pfn: 1180591620717411303424; allowed"),
        (step(op="pages", pfn=0, count=10**15), "step 1.count: 1000000000000000; allowed"),
        (step(op="alloc", id="a", count=10**15), "allowed: a number from 0 to 17179869184"),
        (step(op="plug", id="a", node=1, addr="4G", size=10**30), "step 1.size: 1000000"),
    ],
)
def test_a_scenario_that_ended_in_a_traceback(tmp_path: Path, scenario: Any, words: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(scenario if isinstance(scenario, str) else json.dumps(scenario))
    result = CliRunner().invoke(main, ["run", str(path)])
    assert (result.exit_code, words in result.output) == (2, True), result.output
    assert "bad.json" in result.output


@pytest.mark.parametrize(
    "fields",
    [
        {"op": "pages", "pfn": 0, "count": 1 << 34},
        {"op": "alloc", "id": "a", "count": 1 << 34, "order": 10},
        {"op": "write", "path": "/proc/sys/vm/swappiness", "value": "9" * 5000},
        {
            "op": "write",
            "path": "/sys/module/memory_hotplug/parameters/auto_movable_ratio",
            "value": "9" * 5000,
        },
        {"op": "read", "path": "/sys/devices/system/memory/memory" + "9" * 5000},
        {"op": "read", "path": "/sys/devices/system/memory/memory0/node\u00b2"},
    ],
)
def test_extremes_that_are_allowed_end_well(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(step(**fields)))
    result = CliRunner().invoke(main, ["run", str(path)])
    assert result.exit_code == 0, result.output


def changed(where: str, value: Any) -> dict[str, Any]:
    """A recording with the value at a path like ``steps/1/step/op`` replaced."""
    real = small_recording()
    *path, last = [int(k) if k.isdigit() else k for k in where.split(" ")]
    at: Any = real
    for key in path:
        at = at[key]
    at[last] = value
    return real


@pytest.mark.parametrize("command", ["verify", "replay"])
@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ("steps 1 step op", ["plug"], "steps[1].step.op: ['plug']; allowed: boot"),
        ("unstable", [1], "unstable: 1; allowed: [step, class, key]"),
        ("steps 1 calls", [5], "steps[1].calls: 5; allowed: [depth, function, times]"),
        ("steps 0 log", 5, "steps[0].log: 5; allowed: a list of texts"),
        ("steps 0 files /proc/iomem", 5, "steps[0].files: /proc/iomem: 5; allowed: text"),
        ("steps 1 files /proc/iomem", 5, "steps[1].files: /proc/iomem: 5; allowed: text"),
        ("score_until", "x", "score_until: 'x'; allowed: the number of a step"),
        ("classes", [5], "classes[0]: 5; allowed: text"),
        ("steps 1 reply", 5, "steps[1].reply: 5; allowed: an object"),
        ("machine cpus", 0, "machine.cpus: 0; allowed"),
        (
            "steps 1 step",
            {"op": "pages", "pfn": 0, "count": 10**15},
            "steps[1].step.count: 1000000000000000; allowed",
        ),
        (
            "steps 1 step",
            {"op": "plug", "id": "a", "node": 10**30, "addr": 0, "size": 0},
            "steps[1].step.node: 1000000000000000000000000000000; allowed",
        ),
    ],
)
def test_a_recording_that_ended_in_a_traceback(
    tmp_path: Path, command: str, where: str, value: Any, words: str
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(changed(where, value)))
    more = ["--out", str(tmp_path / "out.json")] if command == "replay" else []
    result = CliRunner().invoke(main, [command, str(path), *more])
    assert (result.exit_code, words in result.output) == (2, True), result.output
    assert "bad.json" in result.output


NODE, MEMORY = "/sys/devices/system/node/", "/sys/devices/system/memory/"


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        (NODE + "possible", "", "possible: ''; allowed: nodes without a gap"),
        (NODE + "possible", "0,2", "possible: '0,2'; allowed: nodes without a gap"),
        (NODE + "online", "0-4", "online: node 4; allowed: 0 to 1"),
        (NODE + "node0/distance", "ten", "node0/distance: 'ten'; allowed: numbers from 10"),
        ("/proc/iomem", None, "/proc/iomem: None; allowed: text"),
        ("/proc/sys/vm/lowmem_reserve_ratio", "a b", "lowmem_reserve_ratio: 'a'; allowed"),
        (MEMORY + "block_size_bytes", "18000000", "'18000000'; allowed: a power of two"),
        (MEMORY + "block_size_bytes", "0", "'0'; allowed: a power of two"),
        (MEMORY + "block_size_bytes", "1000", "'1000'; allowed: a power of two"),
        (MEMORY + "memory1/node7", "link", "memory1/node7: allowed: links to node0 to node1"),
        (MEMORY + "memory1/valid_zones", "Upper", "valid_zones: 'Upper'; allowed: none, DMA"),
        (MEMORY + "memory900/state", "online", "/proc/iomem: no System RAM where memory900 is"),
        (MEMORY + "memory999999999/state", "online", "memory999999999: allowed: blocks up to"),
        (MEMORY + "auto_online_blocks", "maybe", "'maybe'; allowed: offline, online"),
        ("kthreads", "kswapd0", "the files contradict each other: daemons"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(path: str, text: Any, message: str) -> None:
    files = {**recording("movable_node")["steps"][0]["files"], path: text}
    with pytest.raises(ConfigError, match=message):
        Machine.from_files(files)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (r"present +\d+", "present (3)", r"DMA: present '\(3\)'; allowed: a number from 0"),
        (r"present +\d+", "present 3", "node 0 zone DMA: present 3; /proc/iomem and"),
        (r"managed +\d+", "managed 999999", "managed '999999'; allowed: a number from 0 to 3998"),
        (r"spanned +\d+", "spanned 5", "DMA: present 3998; .* make it 5"),
        (r"high +\d+", "high 0", "high '0'; allowed: a number from"),
        (r"batch: +\d+", "batch: 9999999999", "pageset batch '9999999999'; allowed"),
        (r"protection: \(\d", "protection: (9999999999999", "protection '99999.*'; allowed"),
        (r"Node 0, zone +DMA$", "Node 9, zone DMA", "node 9; allowed: 0 to 1"),
    ],
)
def test_what_is_wrong_in_zoneinfo_is_named(old: str, new: str, message: str) -> None:
    files = dict(recording("movable_node")["steps"][0]["files"])
    files["/proc/zoneinfo"] = re.sub(old, new, files["/proc/zoneinfo"], count=1, flags=re.M)
    with pytest.raises(ConfigError, match=message):
        Machine.from_files(files)


def test_a_node_without_cpus_before_one_with_them() -> None:
    """A node has the number that its files say, whatever firmware's order was."""
    files = dict(recording("movable_node")["steps"][0]["files"])
    files[NODE + "node0/cpulist"] = ""
    files[NODE + "node1/cpulist"] = "0-1"
    files[NODE + "online"] = "0-1"
    m = Machine.from_files(files)
    assert (m.cpus_of_node(0), m.cpus_of_node(1)) == ((), (0, 1))
    assert m.nodes[0].populated
    m.validate()
