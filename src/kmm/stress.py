"""A stress test: a machine in use, and random operations, after each hundred of which all adds up.

The steps are those of a scenario, so whatever goes wrong is written as one that ``kmm run`` plays.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from kmm.errors import ConfigError
from kmm.params import GiB, MiB
from kmm.scenario import Player, check_scenario
from kmm.schema import check_step
from kmm.stress_steps import Step, Steps, machine_of

MIN_SIZE, MAX_SIZE, MIN_USED = 4 * GiB, 16 << 40, 64 * MiB


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong: after which operation, the step that was last, and the error."""

    operation: int
    step: Step
    error: Exception

    def __str__(self) -> str:
        text = " ".join(f"{type(self.error).__name__}: {self.error}".split())
        return f"operation {self.operation} ({json.dumps(self.step)}): {text}"


class Stress:
    """A machine under stress.

    :param seed: whatever is random follows from it; size: bytes of the machine, a multiple of
        4 GiB, half of them in DIMMs; used: bytes in use, half of the size at most.
    :raises ConfigError: naming the argument, its value and what is allowed.
    """

    def __init__(self, seed: int, size: int, used: int) -> None:
        if not MIN_SIZE <= size <= MAX_SIZE or size % MIN_SIZE:
            raise ConfigError(f"size: {size}; allowed: multiples of 4G, from 4G to 16T")
        if not MIN_USED <= used <= size // 2:
            raise ConfigError(f"used: {used}; allowed: from 64M to half of the size, {size // 2}")
        self.machine = machine_of(size, seed)
        data = {"machine": self.machine, "steps": []}
        self.player = Player(check_scenario(data, "stress"))
        self.source = Steps(self.player, used, seed)
        #: All that were played, the last of which may have failed.
        self.steps: list[Step] = []
        self.operations = 0  # of them, beside those that brought the memory into use
        self.refused = 0

    def run(
        self, operations: int, every: int = 100, progress: Callable[[int], None] = lambda _: None
    ) -> Failure | None:
        """Bring the memory into use and play random operations.

        :param operations: how many; every: after how many of them everything is recounted.
        :param progress: called after each with the number of operations.
        :return: what failed, None if nothing did.
        """
        try:
            for step in self.source.fill():
                self._play(step)
                progress(0)
            self.player.m.validate()
            while self.operations < operations:
                step = self.source.next()
                self.operations += 1
                self._play(step)
                if self.operations % every == 0 or self.operations == operations:
                    self.player.m.validate()
                progress(self.operations)
        except Exception as e:
            # Whatever is no refusal, which is the outcome of a step, is a fault of the model.
            return Failure(self.operations, self.steps[-1] if self.steps else {}, e)
        return None

    def _play(self, step: Step) -> None:
        self.steps.append(step)
        outcome = self.player.play(check_step(step, f"step {len(self.steps)}"))
        self.refused += bool(outcome.error)

    def as_scenario(self, title: str) -> dict[str, object]:
        """Return what was played as a scenario."""
        return {"title": title, "machine": self.machine, "steps": self.steps}
