"""Recorded calls with virtual durations, and as text like the kernel's function_graph tracer.

A :class:`Timeline` notes beside each recorded call how many pages it was about, how long it waited
by the machine's clock, and what it was about.  Only afterwards :func:`spans` makes durations of
that, with the costs of trace_costs: neither the clock nor what a run shows depends on them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from kmm.acpi_memhotplug import AcpiDevice
from kmm.errors import KernelError
from kmm.memory_block import MemoryBlock
from kmm.memory_hotplug import MHP_NID_IS_MGID, MHP_NONE
from kmm.mmzone import PgData, Zone
from kmm.params import PAGE_SHIFT
from kmm.symbols import display
from kmm.trace_costs import cost

if TYPE_CHECKING:
    from kmm.machine import Machine

#: What a call is about: ("node", 1), ("zone", "node 1 Movable") or ("DIMM", "dimm1").
Subject = tuple[str, int | str]
#: At whose end the counters of the zones are looked at.
SAMPLED = frozenset(
    ("online_pages", "offline_pages", "arch_add_memory", "arch_remove_memory", "__add_pages")
)


def zone_label(zone: Zone) -> str:
    """Return the name under which a zone is shown: ``node 0 Normal``."""
    return f"node {zone.nid} {zone.name}"


@dataclass(frozen=True, slots=True)
class Sample:
    """Free, present and managed pages of the populated zones at a moment."""

    row: int  # at whose end; -1 for before the first call
    zones: dict[str, tuple[int, int, int]]
    dimms: dict[str, int] | None = None  # online pages, known at both ends of a step


@dataclass(slots=True)
class Span:
    """One call, or a run of equal calls, in virtual time (ns)."""

    depth: int
    name: str
    times: int
    start: int = 0
    duration: int = 0
    pages: int = 0
    leaf: bool = True
    subjects: tuple[Subject, ...] = ()
    error: str = ""

    @property
    def end(self) -> int:
        """When it returns."""
        return self.start + self.duration


class Timeline:
    """Notes what a trace needs to become a timeline; the ``watcher`` of a machine's kprobes.

    Equal calls in a row are one row.  What is known of rows stands in dictionaries of numbers, and
    equal subjects are one tuple: the collector has nothing to look through, however many there are.
    """

    def __init__(self, m: Machine) -> None:
        self.m = m
        self.began = m.clock.now
        self.pages: dict[int, int] = {}
        self.waited: dict[int, int] = {}
        self.subjects: dict[int, tuple[Subject, ...]] = {}
        self.errors: dict[int, str] = {}
        self.samples = [Sample(-1, sample_zones(m), sample_dimms(m))]
        self.ended = self.began
        self._alike: dict[tuple[Subject, ...], tuple[Subject, ...]] = {}

    def begin(
        self, row: int, fn: Callable[..., object], args: tuple[object, ...], kw: dict[str, object]
    ) -> object:
        """Note what a call is about and how much of it there is."""
        given = dict(zip(_parameters(fn), args, strict=False), **kw)
        if pages := _pages_of(self.m, fn.__name__, given):
            self.pages[row] = self.pages.get(row, 0) + pages
        if row not in self.subjects and (found := tuple(_subjects_of(self.m, given))):
            self.subjects[row] = self._alike.setdefault(found, found)
        return row, self.m.clock.now, fn.__name__

    def end(self, mark: object, failed: BaseException | None) -> None:
        """Note how long it waited and what it failed with."""
        row, began, name = cast(tuple[int, int, str], mark)  # what begin returned
        if waited := self.m.clock.now - began:
            self.waited[row] = self.waited.get(row, 0) + waited
        if isinstance(failed, KernelError):
            self.errors[row] = failed.why or str(failed)
        if name in SAMPLED:
            self.samples.append(Sample(row, sample_zones(self.m)))

    def finish(self) -> None:
        """The step is over."""
        self.ended = self.m.clock.now
        self.samples.append(Sample(1 << 62, sample_zones(self.m), sample_dimms(self.m)))


def sample_zones(m: Machine) -> dict[str, tuple[int, int, int]]:
    """Return free, present and managed pages of every populated zone."""
    return {
        zone_label(z): (z.nr_free_pages, z.present_pages, z.managed_pages)
        for z in m.all_zones()
        if z.present_pages
    }


def sample_dimms(m: Machine) -> dict[str, int]:
    """Return how many pages of each DIMM lie in online blocks."""
    return {
        dimm.dimm_id: m.block_pages
        * sum(_online(m, *r) for r in dimm.crs or [(dimm.addr, dimm.size)])
        for dimm in m.dimms.values()
    }


def _online(m: Machine, start: int, size: int) -> int:
    found = map(m.memory_blocks.get, range(start // m.block_size, (start + size) // m.block_size))
    return sum(block is not None and block.state == "online" for block in found)


@cache
def _parameters(fn: Callable[..., object]) -> tuple[str, ...]:
    return tuple(inspect.signature(fn).parameters)


def _pages_of(m: Machine, name: str, given: dict[str, Any]) -> int:
    """Return how many pages a call is about, as far as its arguments say so."""
    if "nr_pages" in given:
        return int(given["nr_pages"])
    if "start_pfn" in given and "end_pfn" in given:
        return int(given["end_pfn"] - given["start_pfn"])
    if "start" in given and "end" in given:
        length = int(given["end"] - given["start"])
        return length >> PAGE_SHIFT if name == "init_memory_mapping" else length
    if "size" in given:
        return int(given["size"]) >> PAGE_SHIFT
    if "pfns" in given:
        return len(given["pfns"])
    if "order" in given:
        return int(1 << max(given["order"], 0))
    return m.block_pages if isinstance(given.get("block"), MemoryBlock) else 0


def _subjects_of(m: Machine, given: dict[str, Any]) -> Iterator[Subject]:
    """Tell which node, zone and DIMM a call is about, as far as its arguments say so."""
    for value in given.values():
        if isinstance(value, Zone):
            yield "zone", zone_label(value)
            yield "node", value.nid
            return
        if isinstance(value, PgData):
            yield "node", value.node_id
            return
        if isinstance(value, AcpiDevice) and value.dimm is not None:
            yield "DIMM", value.dimm.dimm_id
            return
        if isinstance(value, MemoryBlock):
            yield from _subjects_of_block(m, value)
            return
    nid = given.get("nid")
    if given.get("mhp_flags", MHP_NONE) & MHP_NID_IS_MGID:
        group = m.memory_groups.get(cast(int, nid))
        nid = group.nid if group is not None else None
    if isinstance(nid, int) and nid >= 0:
        yield "node", nid


def _subjects_of_block(m: Machine, block: MemoryBlock) -> Iterator[Subject]:
    if block.zone is not None:
        yield "zone", zone_label(block.zone)
    if block.nid >= 0:
        yield "node", block.nid
    start = block.block_id * m.block_size
    for dimm in m.dimms.values():
        if dimm.addr <= start < dimm.addr + dimm.size:
            yield "DIMM", dimm.dimm_id


def spans(
    calls: Sequence[Sequence[object]], timeline: Timeline | None = None, start: int = 0
) -> list[Span]:
    """Return recorded calls with virtual times, in call order.

    :param calls: ``[depth, function, times]`` rows; timeline: what was noted of them, if it was;
        start: ns at which the first begins.
    """
    out = [Span(cast(int, d), cast(str, name), cast(int, n)) for d, name, n in calls]
    waited = [0] * len(out)
    if timeline is not None:
        for row, span in enumerate(out):
            span.pages = timeline.pages.get(row, 0)
            span.subjects = timeline.subjects.get(row, ())
            waited[row] = timeline.waited.get(row, 0)
        for row, error in timeline.errors.items():
            out[row].error = error
    _add_up(out, waited)
    _place(out, start)
    return out


def _add_up(found: list[Span], waited: list[int]) -> None:
    """Give each call the cost of its own work, of its callees, and what it waited itself."""
    inside = [0] * len(found)  # ns waited in callees
    above: list[int] = []
    parents: list[int] = []
    for i, span in enumerate(found):
        while above and found[above[-1]].depth >= span.depth:
            above.pop()
        parents.append(above[-1] if above else -1)
        above.append(i)
    for i in range(len(found) - 1, -1, -1):
        span, parent = found[i], parents[i]
        span.duration += cost(span.name, span.times, span.pages) + max(waited[i] - inside[i], 0)
        if parent >= 0:
            found[parent].duration += span.duration
            found[parent].leaf = False
            inside[parent] += max(waited[i], inside[i])


def _place(found: list[Span], start: int) -> None:
    """Let callees follow each other from their caller's start, chains from ``start``."""
    open_: list[Span] = []
    for span in found:
        now = None
        while open_ and open_[-1].depth >= span.depth:
            now = open_.pop().end
        if now is None:  # the first in its caller, or of all
            now = open_[-1].start if open_ else start
        span.start = now
        open_.append(span)


def counters(found: Sequence[Span], timeline: Timeline, end: int) -> list[tuple[int, Sample]]:
    """Return when (ns) the zones had which counters, in order of time.

    :param found: the spans of the timeline's calls; end: when the step was over.
    """
    start = found[0].start if found else end
    out: list[tuple[int, Sample]] = []
    for sample in timeline.samples:
        if sample.row < 0:
            when = start
        else:
            when = found[sample.row].end if sample.row < len(found) else end
        out.append((when, sample))
    return sorted(out, key=lambda pair: pair[0])


#: From how many ns on function_graph marks a duration, and with what.
_MARKS = ((10**9, "$"), (10**8, "@"), (10**7, "*"), (10**6, "#"), (10**5, "!"), (10**4, "+"))
GRAPH_HEAD = """\
# tracer: function_graph
#
# CPU  DURATION                  FUNCTION CALLS
# |     |   |                     |   |   |   |
"""


def _duration(ns: int | None) -> str:
    """Return the duration column: a mark and microseconds, as function_graph aligns them."""
    if ns is None:
        return " " * 14
    mark = next((sign for least, sign in _MARKS if ns > least), " ")
    us = str(ns // 1000)
    number = us if len(us) >= 7 else f"{us}.{ns % 1000:03d}"[:8]
    return f"{mark} {number} us ".ljust(14)


def graph_lines(found: Sequence[Span], cpu: int = 0, vocabulary: str = "6.1") -> Iterator[str]:
    """Yield spans as the lines of the function_graph tracer, their durations virtual.

    A run of equal calls is one line with their common duration and a comment that counts them.

    :param cpu: shown in the first column; vocabulary: ``6.1`` or ``old``.
    """
    open_: list[Span] = []

    def line(duration: int | None, depth: int, text: str) -> str:
        return f" {cpu}) {_duration(duration)}|  {'  ' * depth}{text}"

    for i, span in enumerate(found):
        while open_ and open_[-1].depth >= span.depth:
            done = open_.pop()
            yield line(done.duration, done.depth, "}")
        name = display(span.name, vocabulary)
        comment = f" /* ×{span.times} */" if span.times > 1 else ""
        if span.error:
            comment += f" /* {span.error.replace('*/', '* /')} */"
        if i + 1 < len(found) and found[i + 1].depth > span.depth:
            yield line(None, span.depth, f"{name}() {{{comment}")
            open_.append(span)
        else:
            yield line(span.duration, span.depth, f"{name}();{comment}")
    while open_:
        done = open_.pop()
        yield line(done.duration, done.depth, "}")


@dataclass(slots=True)
class TracedStep:
    """One step of a run in virtual time."""

    number: int
    text: str
    start: int
    end: int
    spans: list[Span] = field(default_factory=list)
    samples: list[tuple[int, Sample]] = field(default_factory=list)
    error: str = ""


class TraceClock:
    """Puts the steps of a run behind each other: the machine's clock and what calls cost."""

    def __init__(self) -> None:
        self.spent = 0

    def step(
        self, number: int, text: str, calls: Sequence[Sequence[object]], timeline: Timeline
    ) -> TracedStep:
        """Return a step with its calls placed in virtual time."""
        start = timeline.began + self.spent
        found = spans(calls, timeline, start)
        busy = sum(span.duration for span in found if span.depth == 0)
        waited = timeline.ended - timeline.began
        length = max(busy, waited)
        self.spent += length - waited
        out = TracedStep(number, text, start, start + length, found)
        out.samples = counters(found, timeline, out.end)
        return out
