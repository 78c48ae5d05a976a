"""Traced steps for other programs: Chrome trace JSON (Perfetto, chrome://tracing), ftrace text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from kmm.symbols import display
from kmm.trace_graph import GRAPH_HEAD, Span, Subject, TracedStep, graph_lines

#: How far the processes of a Chrome trace go: the call chain, and then what calls are about.
_CHAIN, _DIMMS, _FIRST_NODE = 1, 2, 10
_STEPS_TRACK, _CPU_TRACK = 1, 2

Event = dict[str, Any]


def _us(ns: int) -> float:
    """Chrome's time stamps are microseconds."""
    return ns / 1000


class _Tracks:
    """Gives processes and threads of a Chrome trace their numbers and names."""

    def __init__(self) -> None:
        self.names: list[Event] = []
        self._seen: dict[Subject, tuple[int, int]] = {}
        self._processes: set[int] = set()
        self.thread(_CHAIN, _STEPS_TRACK, "steps", "kernel")
        self.thread(_CHAIN, _CPU_TRACK, "CPU 0", "kernel")

    def thread(self, pid: int, tid: int, name: str, process: str) -> tuple[int, int]:
        if pid not in self._processes:
            self._processes.add(pid)
            self._meta("process_name", pid, 0, {"name": process})
            self._meta("process_sort_index", pid, 0, {"sort_index": pid})
        self._meta("thread_name", pid, tid, {"name": name})
        self._meta("thread_sort_index", pid, tid, {"sort_index": tid})
        return pid, tid

    def _meta(self, what: str, pid: int, tid: int, args: dict[str, Any]) -> None:
        self.names.append(
            {"name": what, "ph": "M", "ts": 0, "pid": pid, "tid": tid, "cat": "__metadata"}
            | {"args": args}
        )

    def of(self, subject: Subject) -> tuple[int, int]:
        """Return the process and thread that show what is done to a node, zone or DIMM."""
        if subject not in self._seen:
            kind, which = subject
            if kind == "DIMM":
                number = sum(s[0] == "DIMM" for s in self._seen) + 1
                self._seen[subject] = self.thread(_DIMMS, number, f"DIMM {which}", "DIMMs")
            elif kind == "node":
                pid = _FIRST_NODE + int(which)
                self._seen[subject] = self.thread(pid, 1, f"node {which}", f"node {which}")
            else:
                _, nid, zone = str(which).split(" ", 2)
                pid = _FIRST_NODE + int(nid)
                tid = 2 + sum(s[0] == "zone" and self._seen[s][0] == pid for s in self._seen)
                self._seen[subject] = self.thread(pid, tid, f"zone {zone}", f"node {nid}")
        return self._seen[subject]


def _span_event(span: Span, track: tuple[int, int], vocabulary: str) -> Event:
    args: dict[str, Any] = {}
    if span.times > 1:
        args["calls"] = span.times
    if span.pages:
        args["pages"] = span.pages
    if span.error:
        args["error"] = span.error
    return _event(display(span.name, vocabulary), span.start, span.duration, track, "kernel", args)


def _event(
    name: str, start: int, length: int, track: tuple[int, int], cat: str, args: dict[str, Any]
) -> Event:
    pid, tid = track
    event = {"name": name, "cat": cat, "ph": "X", "ts": _us(start), "dur": _us(length)}
    return event | {"pid": pid, "tid": tid, "args": args}


def chrome_events(steps: Sequence[TracedStep], vocabulary: str = "6.1") -> list[Event]:
    """Return the events of a Chrome trace: names of tracks first, then by time.

    Calls are complete events (``X``): on the track of CPU 0 all of them, on a node's, zone's and
    DIMM's track those that are about it.  Counters (``C``) hold free, present and managed pages of
    each zone and node, and at the ends of a step the online ones of each DIMM.

    :param steps: the steps of a run; vocabulary: ``6.1`` or ``old``.
    """
    tracks = _Tracks()
    events: list[Event] = []
    for step in steps:
        args: dict[str, Any] = {"step": step.number}
        if step.error:
            args["error"] = step.error
        where = (_CHAIN, _STEPS_TRACK)
        name = f"step {step.number}: {step.text}"
        events.append(_event(name, step.start, step.end - step.start, where, "step", args))
        for span in step.spans:
            events.append(_span_event(span, (_CHAIN, _CPU_TRACK), vocabulary))
            for subject in span.subjects:
                events.append(_span_event(span, tracks.of(subject), vocabulary))
        events += _counter_events(step, tracks)
    # A caller comes before what it calls at the same moment.
    events.sort(key=lambda e: (e["ts"], -e.get("dur", 0)))
    return tracks.names + events


def _counter_events(step: TracedStep, tracks: _Tracks) -> Iterator[Event]:
    zones: dict[str, None] = {}  # in the order in which they came
    dimms: dict[str, None] = {}
    for when, sample in step.samples:
        nodes: dict[int, list[int]] = {}
        gone = dict.fromkeys((z for z in zones if z not in sample.zones), (0, 0, 0))
        for label, pages in {**sample.zones, **gone}.items():
            zones[label] = None
            pid = tracks.of(("zone", label))[0]
            yield from _pages_events(label, pages, pid, when)
            total = nodes.setdefault(pid - _FIRST_NODE, [0, 0, 0])
            total[:] = (a + b for a, b in zip(total, pages, strict=True))
        for nid, totals in nodes.items():
            pid = tracks.of(("node", nid))[0]
            yield from _pages_events(f"node {nid}", totals, pid, when)
        if sample.dimms is not None:
            for dimm, online in {**dict.fromkeys(dimms, 0), **sample.dimms}.items():
                dimms[dimm] = None
                pid = tracks.of(("DIMM", dimm))[0]
                yield _counter(f"DIMM {dimm} online pages", online, pid, when)


def _pages_events(label: str, pages: Sequence[int], pid: int, when: int) -> Iterator[Event]:
    for name, count in zip(("free", "present", "managed"), pages, strict=True):
        yield _counter(f"{label} {name} pages", count, pid, when)


def _counter(name: str, pages: int, pid: int, when: int) -> Event:
    event = {"name": name, "cat": "memory", "ph": "C", "ts": _us(when), "pid": pid}
    return event | {"args": {"pages": pages}}


def write_chrome(steps: Sequence[TracedStep], out: TextIO, title: str, vocabulary: str) -> None:
    """Write a Chrome trace (JSON object format), which Perfetto and chrome://tracing open.

    :param steps: the steps of a run; out: where to; title: kept among the trace's other data.
    """
    about = {"title": title, "clock": "virtual nanoseconds since boot, costs estimated"}
    head = json.dumps({"displayTimeUnit": "ns", "otherData": about})
    out.write(head[:-1] + ', "traceEvents": [\n')
    for i, event in enumerate(chrome_events(steps, vocabulary)):
        out.write((",\n" if i else "") + json.dumps(event))
    out.write("\n]}\n")


def write_graph(steps: Sequence[TracedStep], out: TextIO, vocabulary: str) -> None:
    """Write the steps as text of the function_graph tracer; comment lines name the steps."""
    out.write(GRAPH_HEAD)
    for step in steps:
        out.write(f"# step {step.number}: {_one_line(step.text)}\n")
        for line in graph_lines(step.spans, 0, vocabulary):
            out.write(line + "\n")


#: As the function tracer has it; what a model has no value for are dots.
_FTRACE_HEAD = """\
#
#                                _-----=> irqs-off/BH-disabled
#                               / _----=> need-resched
#                              | / _---=> hardirq/softirq
#                              || / _--=> preempt-depth
#                              ||| / _-=> migrate-disable
#                              |||| /     delay
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
#              | |         |   |||||     |         |
"""


def write_ftrace(steps: Sequence[TracedStep], out: TextIO, vocabulary: str) -> None:
    """Write the steps as text of ftrace's function tracer: one line for each call.

    Tasks have no names in a model: each line bears ``<...>``, as ftrace shows a task that it does
    not know, and the step's number in place of a PID.
    """
    entries = sum(span.times for step in steps for span in step.spans)
    out.write("# tracer: function\n#\n")
    out.write(f"# entries-in-buffer/entries-written: {entries}/{entries}   #P:1\n")
    out.write(_FTRACE_HEAD)
    for step in steps:
        task = f"{'<...>':>16}-{step.number:<7}"
        for name, parent, when in _entries(step):
            at = f"{when // 10**9}.{when // 1000 % 10**6:06d}"
            function, caller = display(name, vocabulary), display(parent, vocabulary)
            out.write(f"{task} [000] ..... {at:>12}: {function} <-{caller}\n")


def _entries(step: TracedStep) -> Iterator[tuple[str, str, int]]:
    """Yield each single call: its function, its caller, when it was entered."""
    above: list[Span] = []
    for span in step.spans:
        while above and above[-1].depth >= span.depth:
            above.pop()
        # What is outside of the chain was not traced.
        parent = above[-1].name if above else "0x0"
        for i in range(span.times):
            ahead = span.duration * i // span.times if span.leaf else 0
            yield span.name, parent, span.start + ahead
        above.append(span)


def _one_line(text: str) -> str:
    return " ".join(text.split())
