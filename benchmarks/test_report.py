"""How long a report takes to open in Chromium: until its scripts have drawn what is in sight."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.conftest import MIB
from kmm.report_data import RunRecorder
from kmm.report_html import report_html
from kmm.scenario import Player, check_scenario
from tests.chromium import Browser, browser, need_chromium

ROOT = Path(__file__).parent.parent
RUNS = {
    "demo": ("src/kmm/scenarios/demo.toml", {}),
    "1TiB blocks 128MiB": ("examples/terabyte.toml", {"block_size": 128 * MIB}),
}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    need_chromium()
    pytest.importorskip("vl_convert")
    with browser() as b:
        b.size(1280, 1000)
        yield b


def recorded(path: str, machine: dict[str, Any]) -> dict[str, Any]:
    data = tomllib.loads((ROOT / path).read_text())
    data.get("machine", {}).update(machine)
    scenario = check_scenario(data, path)
    player = Player(scenario)
    recorder = RunRecorder(player.m, scenario.title, len(scenario.steps))
    for number, step in enumerate(scenario.steps, 1):
        recorder.step(number, player.play(step, "timed"))
    return recorder.data


@pytest.mark.benchmark(group="machine")
@pytest.mark.parametrize("name", RUNS)
def test_open_report(benchmark: Any, chromium: Browser, name: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(report_html(recorded(*RUNS[name])))
    benchmark.pedantic(chromium.open, args=(page,), rounds=5, warmup_rounds=1)
    assert chromium.errors == []
    benchmark.extra_info["MB"] = round(page.stat().st_size / 1e6, 1)
