"""The example that compares policies: what it prints is what the machine does, and why.

Boot has 262014 pages; three pieces of 4, 8 and 4 blocks come to nodes 0, 1 and 0.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kmm import Machine

ROOT = Path(__file__).parent.parent
EARLY, BLOCK = 262014, 32768


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "examples" / "ageing.py"))


@pytest.fixture(scope="module")
def figures(example: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """By policy: blocks that are Movable, that could go, that went, of 16."""
    return {
        name: example["take_away"](example["aged"](policy))
        for name, policy in example["POLICIES"].items()
    }


def test_it_prints_a_line_for_each_policy_and_the_document_shows_them(
    example: dict[str, Any],
    figures: dict[str, tuple[int, ...]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    example["main"]()
    out = capsys.readouterr().out
    lines = out.splitlines()[1:]
    for line, (name, (*parts, total)) in zip(lines, figures.items(), strict=True):
        shares = [f"{part / total:.0%}" for part in parts]
        assert line.startswith(name)
        assert line[len(name) :].split() == [*shares, "of", "16", "blocks"]
    text = (ROOT / "docs" / "scenarios.md").read_text()
    assert f"```text\n{out}```" in text


def test_ratios_and_groups_decide_which_zone_memory_goes_to(
    figures: dict[str, tuple[int, ...]],
) -> None:
    movable = {name: shares[0] for name, shares in figures.items()}
    limit = {ratio: EARLY * ratio // 100 // BLOCK for ratio in (301, 100, 50)}
    assert limit == {301: 24, 100: 7, 50: 3}
    assert movable["online_movable"] == movable["memmap_on_memory"] == 16
    assert movable["online_kernel"] == 0
    # Node 1 had no memory at boot: only where all nodes count as one is its DIMM Movable.
    assert movable["301 %, DIMMs"] == 8
    assert movable["301 %, DIMMs, all nodes as one"] == 16
    # Of DIMMs of 4 blocks as many as fit, whole; of blocks in no group as many as fit.
    assert movable["100 %, DIMMs"] == limit[100] // 4 * 4
    assert movable["50 %, DIMMs"] == limit[50] // 4 * 4
    assert movable["100 %, in no group"] == limit[100]
    assert movable["50 %, in no group"] == limit[50]
    # Kernel memory of a dynamic group counts like boot's for the group itself.
    own = 8 - movable["50 %, virtio-mem of 128M"]
    assert movable["50 %, virtio-mem of 128M"] == (EARLY + own * BLOCK) * 50 // 100 // BLOCK == 5
    assert movable["100 %, virtio-mem of 128M"] == 7
    assert movable["100 %, virtio-mem of 512M"] == limit[100] // 4 * 4


def test_how_much_can_be_taken_away_follows(figures: dict[str, tuple[int, ...]]) -> None:
    for which in (1, 2):
        share = {name: shares[which] for name, shares in figures.items()}
        assert share["online_movable"] == share["memmap_on_memory"] == 16
        assert share["301 %, DIMMs, all nodes as one"] == 16
        assert share["online_kernel"] <= share["50 %, DIMMs"] < share["100 %, DIMMs"]
        assert share["100 %, DIMMs"] <= share["301 %, DIMMs"] < 16
        assert share["online_kernel"] < share["50 %, in no group"] < share["100 %, in no group"]
        # What its own kernel memory lets a group have besides pays.
        assert share["50 %, in no group"] < share["50 %, virtio-mem of 128M"]
        assert share["50 %, virtio-mem of 128M"] < share["100 %, virtio-mem of 128M"]
        assert all(shares[0] <= share[name] for name, shares in figures.items())


@pytest.mark.parametrize("name", ["online_kernel", "50 %, virtio-mem of 128M"])
def test_the_figures_are_those_of_the_blocks(example: dict[str, Any], name: str) -> None:
    m: Machine = example["aged"](example["POLICIES"][name])
    said = {block: m.explain_offline(block).can_go for block in m.memory_blocks if block >= 32}
    assert len(said) == 16
    movable, able, gone, total = example["take_away"](m)
    states = [m.read(f"/sys/devices/system/memory/memory{b}/state") for b in said]
    assert (able, gone, total) == (sum(said.values()), states.count("offline\n"), 16)
    assert movable <= able < 16


@pytest.mark.parametrize(
    ("name", "dynamic", "groups"),
    [("100 %, DIMMs", False, 3), ("100 %, in no group", None, 0)]
    + [(f"100 %, virtio-mem of {unit}M", True, 2) for unit in (128, 512)],
)
def test_memory_comes_in_groups(
    example: dict[str, Any], name: str, dynamic: bool | None, groups: int
) -> None:
    m: Machine = example["aged"](example["POLICIES"][name])
    assert len(m.memory_groups) == groups
    assert {g.is_dynamic for g in m.memory_groups.values()} == ({dynamic} if groups else set())
    assert sum(len(g.blocks) for g in m.memory_groups.values()) == (16 if groups else 0)
    m.validate()


def test_a_reader_who_has_had_enough_ends_it_without_a_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, str(ROOT / "examples" / "ageing.py")]
    out = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False, timeout=300)
    os.close(writing)
    assert (out.returncode, out.stderr) == (1, b"")
