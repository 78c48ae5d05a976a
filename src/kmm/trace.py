"""Records which kernel function called which, and orders failures at any of them.

A function marked :func:`traced` costs one attribute test while ``m.kprobes`` is None.  With
probes set, each entry is recorded with its depth, and a :func:`fallible` one may be told to fail
at its n-th call (the kernel's fault-injection framework does the same with fail_function).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Protocol, TypeVar

from kmm.errors import check_number, kernel_error

if TYPE_CHECKING:
    from kmm.machine import Machine

P = ParamSpec("P")
R = TypeVar("R")

#: Kernel functions that can fail, and so may be told to.
FALLIBLE: set[str] = set()
#: The last call of one that can be told to.
NTH_MAX = 1 << 30


class Watcher(Protocol):
    """Wants to know more of a recorded call than its name (trace_graph.Timeline)."""

    def begin(
        self, row: int, fn: Callable[..., object], args: tuple[object, ...], kw: dict[str, object]
    ) -> object:
        """A function is entered; its row is the last of ``calls`` now."""

    def end(self, mark: object, failed: BaseException | None) -> None:
        """It returns, or fails; the mark is what begin returned."""


class Kprobes:
    """The recorder and the orders to fail of one machine.

    :param before: the machine's probes until now, whose orders are shared.
    """

    def __init__(self, recording: bool = False, before: Kprobes | None = None) -> None:
        self.recording = recording
        self.calls: list[list[object]] = []
        self.depth = 0
        self.watcher: Watcher | None = None
        self._faults: dict[str, list[int]] = {} if before is None else before._faults

    def enter(self, name: str, times: int = 1) -> None:
        """Note one entry into a function (or a run of equal ones), and fail it if ordered."""
        if name in self._faults:
            countdown = self._faults[name]
            if countdown[0] <= times:
                del self._faults[name]
                raise kernel_error(countdown[1], f"{name}: failure injected")
            countdown[0] -= times
        if self.recording:
            row = [self.depth, name, times]
            if self.calls and self.calls[-1][:2] == row[:2]:
                self.calls[-1][2] = int(str(self.calls[-1][2])) + times
            else:
                self.calls.append(row)

    def fail(self, name: str, code: int, nth: int = 1) -> None:
        """Order the nth next call of a function to fail.

        :param name: a kernel function that can fail, one of FALLIBLE.
        :param code: the errno, positive or negative.
        :param nth: 1 for the next call.
        :raises InvalidArgument: for a function that has no way to fail in the kernel.
        """
        if name not in FALLIBLE:
            raise kernel_error(-22, f"name: {name!r}; allowed: {', '.join(sorted(FALLIBLE))}")
        self._faults[name] = [check_number("nth", nth, 1, NTH_MAX), code]

    def forget(self) -> None:
        """Withdraw the orders to fail."""
        self._faults.clear()

    def pending(self) -> list[str]:
        """Functions that were told to fail and have not been called often enough yet."""
        return sorted(self._faults)


def traced(fn: Callable[Concatenate[Machine, P], R]) -> Callable[Concatenate[Machine, P], R]:
    """Mark a kernel function so that its calls can be recorded and made to fail."""
    name = fn.__name__

    @wraps(fn)
    def call(m: Machine, /, *args: P.args, **kwargs: P.kwargs) -> R:
        probes = m.kprobes
        if probes is None:
            return fn(m, *args, **kwargs)
        probes.enter(name)
        probes.depth += 1
        try:
            if probes.watcher is not None:
                return _watched(probes, probes.watcher, fn, (m, *args), kwargs)
            return fn(m, *args, **kwargs)
        finally:
            probes.depth -= 1

    return call


def _watched(
    probes: Kprobes,
    watcher: Watcher,
    fn: Callable[..., R],
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> R:
    """Call a function that a watcher wants to see begin and end."""
    mark = watcher.begin(len(probes.calls) - 1, fn, args, kwargs)
    try:
        out = fn(*args, **kwargs)
    except BaseException as e:
        watcher.end(mark, e)
        raise
    watcher.end(mark, None)
    return out


def fallible(fn: Callable[Concatenate[Machine, P], R]) -> Callable[Concatenate[Machine, P], R]:
    """Mark a kernel function that can fail, as traced and so that tests can make it fail."""
    FALLIBLE.add(fn.__name__)
    return traced(fn)


def note(m: Machine, name: str, times: int = 1) -> None:
    """Record calls of a function whose work the engine does in one go."""
    if m.kprobes is not None and times > 0:
        m.kprobes.enter(name, times)


def visible_calls(calls: Sequence[Sequence[object]], visible: set[str]) -> list[list[object]]:
    """Keep the functions that a tracer sees; callees of hidden ones move up to their caller.

    :param calls: ``[depth, function, times]`` rows, a tree in call order.
    :param visible: functions that are not inlined in the reference build.
    :return: rows of the same form.
    """
    out: list[list[object]] = []
    hidden: list[int] = []  # depths of the hidden functions that enclose the current row
    for depth, name, times in calls:
        level = int(str(depth))
        while hidden and hidden[-1] >= level:
            hidden.pop()
        if name not in visible:
            hidden.append(level)
            continue
        row: list[object] = [level - len(hidden), name]
        if out and out[-1][:2] == row:
            out[-1][2] = int(str(out[-1][2])) + int(str(times))
        else:
            out.append([*row, times])
    return out
