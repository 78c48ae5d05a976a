"""Scores a replay against its recording, fact by fact.

The rules are those that come with the recordings: the boot step is input and counts for
nothing, nor does a fact that neither side has changed since boot; facts that a second recording
did not confirm are left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kmm.zoneinfo import zone_number, zone_table

Fact = tuple[str, Any, Any]

MEMORY, NODE = "/sys/devices/system/memory/", "/sys/devices/system/node/"
LOG = re.compile(
    r"Fallback order|Built \d+ zonelists|Policy zone|Block size|unaligned|[Rr]emov|hotplug|"
    r"acpi PNP0C80|min_free_kbytes|System RAM"
)
LAYOUT = ("spanned", "present", "managed", "protection", "start_pfn")
MARKS = ("min", "low", "high")
PAGESET = ("pageset high", "pageset batch", "vm stats threshold")


@dataclass(slots=True)
class Score:
    """Agreeing and compared facts per class, and the differences."""

    good: Counter[str] = field(default_factory=Counter)
    total: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)

    def add(self, other: Score) -> None:
        """Count another score in."""
        self.good += other.good
        self.total += other.total
        self.differences += other.differences

    @property
    def perfect(self) -> bool:
        """Whether every fact agrees."""
        return sum(self.good.values()) == sum(self.total.values())

    def table(self) -> str:
        """Return the figures as text, a row a class."""
        rows = [(c, self.good[c], self.total[c]) for c in sorted(self.total)]
        rows.append(("all", sum(self.good.values()), sum(self.total.values())))
        return "\n".join(
            f"{name:<20} {good:7} / {total:7}  {100 * good / max(total, 1):6.2f} %"
            for name, good, total in rows
        )


def _free_rows(text: str) -> Iterator[tuple[int, str, str, list[str]]]:
    pattern = r"Node +([0-9]{1,4}), zone +(\w+)(?:, type +(\w+))?((?: +>?[0-9]+)+) *$"
    for match in re.finditer(pattern, text, re.M):
        counts = match[4].split()
        if len(counts) > 5:
            yield int(match[1]), match[2], match[3] or "", counts


def facts(step: Mapping[str, Any], boot: bool, boot_nodes: set[int]) -> Iterator[Fact]:
    """Yield (class, key, value) for all that can be compared of a step."""
    op = step["step"]["op"]
    if op == "write":
        yield "errors", "rc", step.get("rc")
        yield "errors", "error", step.get("error", "")
    if op in ("plug", "unplug") and "reply" in step:
        yield "errors", "refused", "error" in step["reply"]
    if "pages" in step:
        yield "page flags", "runs", step["pages"]
    files = step.get("files")
    if files is None:
        return
    if not boot:
        yield "kernel log", "lines", [s.rstrip() for s in step.get("log", []) if LOG.search(s)]
        yield "uevents", "sequence", step.get("uevents", [])
    yield from _file_facts(files)
    yield from _zone_facts(files, boot_nodes)


def _file_facts(files: Mapping[str, str]) -> Iterator[Fact]:
    for number, line in enumerate(files.get("/proc/iomem", "").split("\n")):
        yield "iomem", number, line.rstrip()
    for path, raw in files.items():
        text = raw.strip()
        if path.startswith(MEMORY):
            yield "sysfs memory", path[len(MEMORY) :], text
        elif path.startswith(NODE):
            if not path.endswith("/meminfo"):
                yield "sysfs node", path[len(NODE) :], text
            elif match := re.search(r"Node \d+ MemTotal: +(\d+)", text):
                yield "sysfs node", path[len(NODE) :] + " MemTotal", match[1]
        elif path.startswith("/proc/sys/vm/"):
            yield "tunables", path, text.split()
    if match := re.search(r"MemTotal: +(\d+)", files.get("/proc/meminfo", "")):
        yield "meminfo", "MemTotal", match[1]
    if "kthreads" in files:
        yield "kthreads", "running", files["kthreads"].split()


def _zone_facts(files: Mapping[str, str], boot_nodes: set[int]) -> Iterator[Fact]:
    quiet = set()
    for (nid, name), zone in zone_table(files.get("/proc/zoneinfo", "")).items():
        for cls, keys in (("zone layout", LAYOUT), ("watermarks", MARKS), ("pagesets", PAGESET)):
            for key in keys:
                yield cls, f"node {nid} {name} {key}", zone.get(key)
        if zone.get("pages free") == zone.get("managed"):
            quiet.add((nid, name))
    for path, cls in (("/proc/buddyinfo", "buddyinfo"), ("/proc/pagetypeinfo", "pagetypeinfo")):
        for nid, name, kind, counts in _free_rows(files.get(path, "")):
            # On nodes that had memory at boot the recorded system itself allocates.
            if nid not in boot_nodes:
                suffix = "" if (nid, name) in quiet else " in use"
                yield cls + suffix, f"node {nid} {name} {kind}", counts


def _edges(calls: list[list[Any]]) -> list[tuple[str, str]]:
    stack: list[str] = []
    out: list[tuple[str, str]] = []
    for depth, name, *_ in calls:
        del stack[depth:]
        out.append((stack[-1] if stack else "", name))
        stack.append(name)
    return list(dict.fromkeys(out))


def compare_calls(real: list[list[Any]], model: list[list[Any]]) -> tuple[int, int]:
    """Return how many of the real caller-callee pairs the model has in order, of how many."""
    want, have = _edges(real), _edges(model)
    row = [0] * (len(have) + 1)
    for a in want:
        nxt = [0]
        for j, b in enumerate(have):
            nxt.append(row[j] + 1 if a == b else max(row[j + 1], nxt[j]))
        row = nxt
    return row[-1], len(want)


def compare(real: Mapping[str, Any], model: Mapping[str, Any]) -> Score:
    """Score what a model shows against a recording of the same layout.

    :param real: a recording that replay.check_recording has passed.
    :raises ConfigError: if its boot step's zoneinfo has no number where one is needed.
    """
    score = Score()
    boot_zones = zone_table(real["steps"][0]["files"]["/proc/zoneinfo"])
    boot_nodes = {z[0] for z in boot_zones if zone_number(boot_zones, z, "managed")}
    at_boot = {(c, k): v for c, k, v in facts(real["steps"][0], True, boot_nodes)}
    only = set(real.get("classes", ()))
    last = real.get("score_until", len(real["steps"]))
    unstable = {(n, c, k) for n, c, k in real.get("unstable", [])}
    for i, (r, m) in enumerate(zip(real["steps"], model["steps"], strict=True)):
        if not 0 < i < last:
            continue
        _compare_step(i, r, m, at_boot, boot_nodes, only, unstable, score)
    return score


def _compare_step(
    i: int,
    r: Mapping[str, Any],
    m: Mapping[str, Any],
    at_boot: dict[tuple[str, Any], Any],
    boot_nodes: set[int],
    only: set[str],
    unstable: set[tuple[int, str, Any]],
    score: Score,
) -> None:
    want = {(c, k): v for c, k, v in facts(r, False, boot_nodes)}
    have = {(c, k): v for c, k, v in facts(m, False, boot_nodes)}
    for (cls, key), value in want.items():
        if (only and cls not in only) or (i, cls, key) in unstable:
            continue
        if value == at_boot.get((cls, key)) == have.get((cls, key)):
            continue
        score.total[cls] += 1
        if have.get((cls, key)) == value:
            score.good[cls] += 1
        else:
            seen = have.get((cls, key), "(absent)")
            score.differences.append(f"step {i} {cls}: {key}\n  real  {value!r}\n  model {seen!r}")
    for cls, key in have.keys() - want.keys():
        if cls.startswith(("sysfs", "iomem")) and (not only or cls in only):
            if (i, cls, key) in unstable:
                continue
            score.total[cls] += 1
            score.differences.append(f"step {i} {cls}: {key}\n  real  (absent)")
    if "calls" in r and (not only or "call chain" in only):
        good, total = compare_calls(r["calls"], m.get("calls", []))
        score.good["call chain"] += good
        score.total["call chain"] += total
        if good < total:
            score.differences.append(f"step {i} call chain: {good} of {total} in order")
