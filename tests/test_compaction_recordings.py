"""Compaction of a real kernel, page by page: recordings of a memory-only node that is compacted."""

from __future__ import annotations

from typing import Any

import pytest

from kmm import Machine
from kmm.clock import SECOND
from kmm.replay import boot_machine, play_step
from kmm.vmstat import all_vm_events
from tests.conftest import recording

NAMES = ("compact_direct", "compact_files", "compact_mixed", "compact_proactive")
#: What both scanners did, and what came of it.
COUNTED = (
    "pgmigrate_success",
    "pgmigrate_fail",
    "compact_migrate_scanned",
    "compact_free_scanned",
    "compact_isolated",
)
FREE = 0x400


def played(name: str) -> list[tuple[dict[str, Any], dict[str, Any], Machine]]:
    """Play a recording step by step: what was recorded, what the model shows, and the machine."""
    real = recording(name)
    m = boot_machine(real)
    out = []
    for entry in real["steps"][1 : real.get("score_until", len(real["steps"]))]:
        shown = play_step(m, entry["step"])
        m.clock.advance(SECOND)
        shown["events"] = {k: all_vm_events(m)[k] for k in COUNTED}
        shown["extfrag"] = m.read("/sys/kernel/debug/extfrag/unusable_index") + m.read(
            "/sys/kernel/debug/extfrag/extfrag_index"
        )
        out.append((entry, shown, m))
    m.validate()
    return out


def free_runs(runs: list[list[Any]]) -> list[tuple[int, bool]]:
    """Page flags as runs of pages that are on the free lists, or not."""
    out: list[tuple[int, bool]] = []
    for n, flags in runs:
        free = int(flags, 16) == FREE
        if out and out[-1][1] == free:
            n += out.pop()[0]
        out.append((n, free))
    return out


@pytest.mark.parametrize("name", NAMES)
def test_every_page_ends_up_where_the_kernel_puts_it(name: str) -> None:
    seen = [
        (entry["pages"], shown["pages"]) for entry, shown, _ in played(name) if "pages" in entry
    ]
    assert len(seen) >= 2
    for real, model in seen:
        assert free_runs(model) == free_runs(real)


def counters(entry: dict[str, Any]) -> dict[str, int]:
    """What a step that shows /proc/vmstat shows of COUNTED."""
    rows = (line.split() for line in entry.get("out", []))
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[0] in COUNTED}


@pytest.mark.parametrize("name", ["compact_direct", "compact_mixed", "compact_proactive"])
def test_the_scanners_look_at_as_many_pages(name: str) -> None:
    # In compact_files the first node is compacted too, whose pages nobody knows.
    checked = 0
    before: dict[str, int] = {}
    for entry, shown, _ in played(name):
        want = counters(entry)
        if want:
            before = before or {k: want[k] - shown["events"][k] for k in COUNTED}
            if name == "compact_proactive":
                # Where huge pages were on a CPU's list when kcompactd came by is a matter of time.
                want["compact_free_scanned"] = shown["events"]["compact_free_scanned"]
            assert {k: want[k] - before[k] for k in COUNTED} == shown["events"]
            checked += any(want.values())
    assert checked


def test_extfrag_is_shown_as_the_kernel_shows_it() -> None:
    rows = 0
    for entry, shown, _ in played("compact_direct"):
        want = [line for line in entry.get("out", []) if line.startswith("Node 1, zone")]
        for line in want:
            assert line in shown["extfrag"].split("\n")
            rows += 1
    assert rows == 2
