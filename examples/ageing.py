"""How much of a machine that has aged under load can be taken away again, by policy.

Plays ageing.toml with each way of bringing memory online.  Prints which share of the hot-plugged
blocks could go just then, and which went when all were taken offline, the highest first.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

from kmm import KernelError, Machine
from kmm.scenario import Player, check_scenario, load_data

POLICIES = {
    "online_movable": "memhp_default_state=online_movable",
    "online_kernel": "memhp_default_state=online_kernel",
    "auto-movable, ratio 301": "memhp_default_state=online memory_hotplug.online_policy="
    "auto-movable",
    "auto-movable, ratio 100": "memhp_default_state=online memory_hotplug.online_policy="
    "auto-movable memory_hotplug.auto_movable_ratio=100",
    "memmap_on_memory": "memhp_default_state=online_movable memory_hotplug.memmap_on_memory=1",
}
SCENARIO = Path(__file__).with_name("ageing.toml")


def aged(cmdline: str) -> Machine:
    """Play the scenario on a machine with these kernel parameters."""
    data = copy.deepcopy(load_data(SCENARIO))
    data["machine"]["cmdline"] = cmdline
    player = Player(check_scenario(data, SCENARIO.name))
    for step in player.scenario.steps:
        outcome = player.play(step)
        if outcome.error:
            raise SystemExit(f"{cmdline}: {outcome.text}: {outcome.error}")
    return player.m


def take_away(m: Machine) -> tuple[int, int, int]:
    """Take offline what goes: how many hot-plugged blocks could go, how many went, of how many."""
    blocks = sorted((b for b in m.memory_blocks if b << 27 >= 4 << 30), reverse=True)
    able = sum(m.explain_offline(block).can_go for block in blocks)
    gone = 0
    for block in blocks:
        try:
            m.write(f"/sys/devices/system/memory/memory{block}/state", "offline")
            gone += 1
        except KernelError:
            pass
    m.validate()
    return able, gone, len(blocks)


def main() -> None:
    """Print a line for each policy."""
    print(f"{'policy':24} could go   went")
    for name, cmdline in POLICIES.items():
        able, gone, total = take_away(aged(cmdline))
        print(f"{name:24} {able / total:8.0%} {gone / total:6.0%}  of {total} blocks")


if __name__ == "__main__":
    sys.exit(main())
