"""The machine's own time, which passes only where something waits (kernel/time)."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from kmm.errors import check_number

SECOND = 1_000_000_000


@dataclass(slots=True)
class Clock:
    """Virtual time in ns since boot, and what is to happen at a time.

    Nothing here looks at the host's clock: the same calls see the same times.
    """

    now: int = 0
    #: Called whenever time has passed: what looks after something now and then.
    watchers: list[Callable[[], None]] = field(default_factory=list)
    _timers: list[tuple[int, int, Callable[[], None]]] = field(default_factory=list)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def call_at(self, when: int, what: Callable[[], None]) -> None:
        """Have something happen at a time (ns; at once if that has passed) while somebody waits."""
        heapq.heappush(self._timers, (max(when, self.now), next(self._numbers), what))

    def call_after(self, delay: int, what: Callable[[], None]) -> None:
        """Have something happen after a delay (ns)."""
        self.call_at(self.now + check_number("delay", delay, 0, 1 << 62), what)

    def next_event(self) -> int | None:
        """When the next thing happens; None if nothing is to."""
        return self._timers[0][0] if self._timers else None

    def advance(self, delay: int) -> None:
        """Let time pass (ns); what falls into it happens in its order."""
        end = self.now + check_number("delay", delay, 0, 1 << 62)
        while self._timers and self._timers[0][0] <= end:
            when, _, what = heapq.heappop(self._timers)
            # What happened before may have let time pass itself.
            self.now = max(self.now, when)
            what()
        self.now = max(self.now, end)
        if delay:
            for look in self.watchers:
                look()

    def wait_until(self, deadline: int) -> None:
        """Let time pass until something has happened, but no longer than to the deadline (ns)."""
        event = self.next_event()
        when = deadline if event is None else min(event, deadline)
        self.advance(max(when - self.now, 0))


@dataclass(slots=True)
class Ratelimit:
    """Lets so many through in each interval (struct ratelimit_state, lib/ratelimit.c)."""

    interval: int = 5 * SECOND
    burst: int = 10
    _begin: int | None = None
    _passed: int = 0

    def allows(self, now: int) -> bool:
        """Whether one more may pass at a time (ns)."""
        if self._begin is None or now >= self._begin + self.interval:
            self._begin, self._passed = now, 0
        self._passed += 1
        return self._passed <= self.burst
