"""What a report shows of a run: looked at after each step, kept as changes, and as plain values.

A run is a dictionary that JSON takes as it is (``kmm run --save``, ``kmm report``).  Equal lines,
calls and attempts that differ by a running number are kept once with how many they are, so that a
terabyte's run is small too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kmm.errors import ConfigError, printable, shown
from kmm.memory_block import MemoryBlock
from kmm.offline_report import OfflineAttempt, OfflineReport
from kmm.params import MIGRATETYPE_NAMES
from kmm.trace_graph import Span, TraceClock, zone_label
from kmm.wording import counted

if TYPE_CHECKING:
    from kmm.machine import Machine
    from kmm.scenario import Outcome

FORMAT = 1
#: Moments that are kept of a run; of one with more steps every second, third, ...
MOST_MOMENTS = 400
#: Calls, and lines of log and uevents, that are kept of a run; the rest is counted.
MOST_CALLS, MOST_LINES = 20_000, 10_000
#: [name, calls, ns, pages, error, callees]
Node = list[Any]

_NUMBER = re.compile(r"\d+")


def fold_lines(lines: Sequence[str]) -> list[str]:
    """Return lines with those in a row that differ by one running number as one.

    ``online memory32``, ``online memory33`` become ``online memory32..33 (2 lines)``.
    """
    out: list[str] = []
    i = 0
    while i < len(lines):
        end, text = i + 1, lines[i]
        for found in _NUMBER.finditer(lines[i]):
            head, tail, first = text[: found.start()], text[found.end() :], int(found[0])
            stop = i + 1
            while stop < len(lines) and lines[stop] == f"{head}{first + stop - i}{tail}":
                stop += 1
            if stop > end:
                end = stop
                last = first + stop - i - 1
                folded = f"{head}{first}..{last}{tail} ({counted(stop - i, 'line')})"
        out.append(printable(text if end == i + 1 else folded))
        i = end
    return out


def fold_calls(spans: Sequence[Span]) -> list[Node]:
    """Return calls as a tree in which equal calls in a row, with equal callees, are one."""
    roots: list[Node] = []
    open_: list[tuple[int, Node]] = []

    def close(depth: int) -> None:
        while open_ and open_[-1][0] >= depth:
            _, node = open_.pop()
            siblings = open_[-1][1][5] if open_ else roots
            if len(siblings) > 1 and _same(siblings[-2], node):
                siblings.pop()
                _merge(siblings[-1], node)

    for span in spans:
        close(span.depth)
        node: Node = [span.name, span.times, span.duration, span.pages, printable(span.error), []]
        (open_[-1][1][5] if open_ else roots).append(node)
        open_.append((span.depth, node))
    close(0)
    return roots


def _same(a: Node, b: Node) -> bool:
    """Whether two calls ran the same functions; how often and how long may differ."""
    return a[0] == b[0] and a[4] == b[4] and len(a[5]) == len(b[5]) and all(map(_same, a[5], b[5]))


def _merge(into: Node, other: Node) -> None:
    for i in (1, 2, 3):
        into[i] += other[i]
    for mine, theirs in zip(into[5], other[5], strict=True):
        _merge(mine, theirs)


def _count(nodes: Sequence[Node]) -> int:
    return sum(1 + _count(node[5]) for node in nodes)


class RunRecorder:
    """Looks at a machine at the beginning and after each step of a run.

    :param m: the machine; title: of the scenario; steps: how many there will be.
    """

    def __init__(self, m: Machine, title: str, steps: int) -> None:
        self.m = m
        self.every = -(-steps // MOST_MOMENTS) or 1
        self.total = steps
        self.clock = TraceClock()
        self._codes: dict[tuple[str, str, str], int] = {}
        self._blocks: dict[int, int] = {}
        self._calls = self._lines = 0
        m.offline_report = OfflineReport(m)
        self.data: dict[str, Any] = {
            "kmm_run": FORMAT,
            "title": printable(title),
            "block_size": m.block_size,
            "legend": [],
            "moments": [],
            "steps": [],
        }
        self._look(0)

    def step(self, number: int, out: Outcome) -> None:
        """Keep what a step did, which was played with ``trace="timed"``.

        :param number: of the step, from 1; out: its outcome.
        """
        assert out.timeline is not None  # as the docstring says
        traced = self.clock.step(number, out.text, out.calls, out.timeline)
        calls = fold_calls(traced.spans)
        self._calls += _count(calls)
        left_out = self._calls > MOST_CALLS
        report = self.m.offline_report
        self.data["steps"].append(
            {
                "text": printable(out.text),
                "error": printable(out.error),
                "output": "\n".join(map(printable, out.output.split("\n"))),
                "uevents": self._kept(out.uevents),
                "log": self._kept(out.log),
                "offline": fold_attempts(self.m, report.attempts if report else []),
                "calls": [] if left_out else calls,
                "calls_left_out": len(out.calls) if left_out else 0,
                "start_ns": traced.start,
                "end_ns": traced.end,
            }
        )
        if report is not None:
            report.attempts.clear()
        if number % self.every == 0 or number == self.total:
            self._look(number)

    def _kept(self, lines: Sequence[str]) -> list[str]:
        out = fold_lines(lines)
        room = max(MOST_LINES - self._lines, 0)
        self._lines += len(out)
        return out if len(out) <= room else [*out[:room], f"and {len(out) - room} more lines"]

    def _look(self, number: int) -> None:
        """Keep what has changed of the blocks, and the zones' numbers."""
        m, zones = self.m, {}
        free = m.free_blocks()
        for zone in m.all_zones():
            if zone.present_pages:
                lists = free[zone.nid, zone.zone_idx]
                zones[zone_label(zone)] = {
                    "free": zone.nr_free_pages,
                    "min": zone.min_wmark_pages(),
                    "low": zone.low_wmark_pages(),
                    "high": zone.high_wmark_pages(),
                    "present": zone.present_pages,
                    "managed": zone.managed_pages,
                    "blocks": {
                        name: lists[mt].tolist()
                        for mt, name in enumerate(MIGRATETYPE_NAMES)
                        if lists[mt].any()
                    },
                }
        self.data["moments"].append(
            {"step": number, "changed": self._changed_blocks(), "zones": zones}
        )

    def _changed_blocks(self) -> list[list[int]]:
        """Return runs [first block, blocks, code] of what is new; -1 is for blocks that went."""
        now = {block_id: self._code(b) for block_id, b in self.m.memory_blocks.items()}
        changed = {i: code for i, code in now.items() if self._blocks.get(i) != code}
        changed |= dict.fromkeys(self._blocks.keys() - now.keys(), -1)
        self._blocks = now
        runs: list[list[int]] = []
        for block_id in sorted(changed):
            code = changed[block_id]
            if runs and runs[-1][2] == code and sum(runs[-1][:2]) == block_id:
                runs[-1][1] += 1
            else:
                runs.append([block_id, 1, code])
        return runs

    def _code(self, block: MemoryBlock) -> int:
        if block.zone is not None:
            zone = block.zone.name
        else:
            zone = "several" if block.state == "online" else "none"
        nodes = block.nodes or ((block.nid,) if block.nid >= 0 else ())
        key = (block.state, zone, "-".join(map(str, nodes)) or "?")
        code = self._codes.setdefault(key, len(self._codes))
        if code == len(self.data["legend"]):
            self.data["legend"].append(list(key))
        return code


def fold_attempts(m: Machine, attempts: Sequence[OfflineAttempt]) -> list[dict[str, Any]]:
    """Return attempts to offline blocks; those in a row that went the same way are one."""
    out: list[dict[str, Any]] = []
    for attempt in attempts:
        first = attempt.start_pfn // m.block_pages
        count = -(-attempt.nr_pages // m.block_pages)
        row = {
            "first": first,
            "blocks": count,
            "pages": attempt.nr_pages,
            "counts": attempt.counts(),
            "error": printable(str(attempt.error)) if attempt.error is not None else "",
            "reason": attempt.reason,
            "blocked": attempt.blocked,
            "by": printable(_in_the_way(m, attempt)),
        }
        last = out[-1] if out else None
        if (
            last is not None
            and not row["error"]
            and not last["error"]
            and last["first"] + last["blocks"] == first
            and set(last["counts"]) == set(attempt.counts())
        ):
            last["blocks"] += count
            last["pages"] += attempt.nr_pages
            last["counts"] = {k: n + attempt.counts()[k] for k, n in last["counts"].items()}
        else:
            out.append(row)
    return out


def _in_the_way(m: Machine, attempt: OfflineAttempt) -> str:
    return m.describe_page(attempt.blocked) if attempt.blocked is not None else ""


_TEXTS = ("text", "error", "output")
_ZONE_NUMBERS = ("free", "min", "low", "high", "present", "managed")


def check_run(data: Any, name: str) -> dict[str, Any]:
    """Check that a file holds a saved run of this format.

    :param data: the parsed file; name: its name, for messages.
    :raises ConfigError: naming the field and what is allowed.
    """
    run = _mapping(data, name, "run")
    if run.get("kmm_run") != FORMAT:
        raise ConfigError(
            f"{name}: kmm_run: {shown(run.get('kmm_run'))}; allowed: {FORMAT}, as this kmm saves"
        )
    _text(run.get("title"), name, "title")
    if _integer(run.get("block_size"), name, "block_size") <= 0:
        raise ConfigError(f"{name}: block_size: {run['block_size']}; allowed: bytes")
    legend = _list(run.get("legend"), name, "legend")
    for row in legend:
        if not (isinstance(row, list) and len(row) == 3 and all(isinstance(w, str) for w in row)):
            raise ConfigError(f"{name}: legend: {shown(row)}; allowed: state, zone and node")
    steps = _list(run.get("steps"), name, "steps")
    for number, step in enumerate(steps, 1):
        _check_step(step, name, f"steps {number}")
    moments = _list(run.get("moments"), name, "moments")
    if not moments:
        raise ConfigError(f"{name}: moments: none; allowed: at least the first")
    last = -1
    for i, moment in enumerate(moments):
        _check_moment(moment, name, f"moments {i}", len(legend))
        if not last < moment["step"] <= len(steps):
            raise ConfigError(f"{name}: moments {i}: step: {moment['step']}; allowed: rising")
        last = moment["step"]
    return dict(run)


def _check_moment(moment: Any, name: str, where: str, codes: int) -> None:
    _integer(_mapping(moment, name, where).get("step"), name, f"{where}: step")
    for run in _list(moment.get("changed"), name, f"{where}: changed"):
        if not (
            isinstance(run, list)
            and len(run) == 3
            and all(isinstance(n, int) for n in run)
            and run[0] >= 0
            and 0 < run[1] <= 1 << 19
            and -1 <= run[2] < codes
        ):
            raise ConfigError(f"{name}: {where}: changed: {shown(run)}; allowed: a run of blocks")
    for label, zone in _mapping(moment.get("zones"), name, f"{where}: zones").items():
        at = f"{where}: zones: {shown(label)}"
        for field in _ZONE_NUMBERS:
            _integer(_mapping(zone, name, at).get(field), name, f"{at}: {field}")
        for mt, counts in _mapping(zone.get("blocks"), name, f"{at}: blocks").items():
            for count in _list(counts, name, f"{at}: blocks: {shown(mt)}"):
                _integer(count, name, f"{at}: blocks: {shown(mt)}")


def _check_step(step: Any, name: str, where: str) -> None:
    _mapping(step, name, where)
    for field in _TEXTS:
        _text(step.get(field), name, f"{where}: {field}")
    for field in ("start_ns", "end_ns", "calls_left_out"):
        _integer(step.get(field), name, f"{where}: {field}")
    for field in ("uevents", "log"):
        for line in _list(step.get(field), name, f"{where}: {field}"):
            _text(line, name, f"{where}: {field}")
    for row in _list(step.get("offline"), name, f"{where}: offline"):
        at = f"{where}: offline"
        for field in ("first", "blocks", "pages"):
            _integer(_mapping(row, name, at).get(field), name, f"{at}: {field}")
        for field in ("error", "reason", "by"):
            _text(row.get(field), name, f"{at}: {field}")
        for count in _mapping(row.get("counts"), name, f"{at}: counts").values():
            _integer(count, name, f"{at}: counts")
    _check_calls(step.get("calls"), name, f"{where}: calls")


def _check_calls(nodes: Any, name: str, where: str) -> None:
    for node in _list(nodes, name, where):
        if not (
            isinstance(node, list)
            and len(node) == 6
            and isinstance(node[0], str)
            and all(isinstance(n, int) for n in node[1:4])
            and isinstance(node[4], str)
        ):
            raise ConfigError(f"{name}: {where}: {shown(node)}; allowed: a call")
        _check_calls(node[5], name, where)


def _mapping(value: Any, name: str, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}: {where}: {shown(value)}; allowed: an object")
    return value


def _list(value: Any, name: str, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ConfigError(f"{name}: {where}: {shown(value)}; allowed: a list")
    return value


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{name}: {where}: {shown(value)}; allowed: text")
    return value


def _integer(value: Any, name: str, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name}: {where}: {shown(value)}; allowed: a whole number")
    return value
