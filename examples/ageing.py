"""How much of a machine that has aged under load can be taken away again, by policy.

Plays ageing.toml once for each policy: how memory comes, which decides its memory group, and which
zone its blocks then go to.  Prints which share of the hot-plugged blocks lies in a Movable zone,
which could go just then (m.explain_offline), and which went when all were taken offline, the
highest first.  A percentage is the ratio of the auto-movable policy.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kmm import KernelError, Machine
from kmm.data_files import load_data
from kmm.memory_group import memory_group_register_dynamic
from kmm.memory_hotplug import MHP_NID_IS_MGID, add_memory, add_memory_driver_managed
from kmm.scenario import Player, check_scenario

SCENARIO = Path(__file__).with_name("ageing.toml")
FIRST_ADDR = 4 << 30  # of what is hot-plugged
PAGE_SIZE = 4096
AUTO = "memhp_default_state=online memory_hotplug.online_policy=auto-movable"
#: Brings memory to a machine: node, first byte, bytes.
Way = Callable[[Machine, int, int, int], None]


def without_group(m: Machine, nid: int, start: int, size: int) -> None:
    """Add memory block by block and in no group, as a hypervisor's balloon does."""
    for at in range(start, start + size, m.block_size):
        add_memory(m, nid, at, m.block_size)


def virtio_mem(unit: int) -> Way:
    """Return how a virtio-mem device for each node adds its memory, in a dynamic group.

    :param unit: bytes that come and go together: a memory block, or several.
    """

    def add(m: Machine, nid: int, start: int, size: int) -> None:
        mgid = next((g.mgid for g in m.memory_groups.values() if g.nid == nid), None)
        if mgid is None:
            mgid = memory_group_register_dynamic(m, nid, unit // PAGE_SIZE)
        for at in range(start, start + size, unit):
            name = "System RAM (virtio_mem)"
            add_memory_driver_managed(m, mgid, at, unit, name, MHP_NID_IS_MGID)

    return add


@dataclass(frozen=True)
class Policy:
    """Kernel parameters, and how memory comes: as DIMMs, each a static group, if that is None."""

    cmdline: str
    way: Way | None = None


def auto_movable(ratio: int, way: Way | None = None, numa_aware: str = "Y") -> Policy:
    """Return the policy that lets so many percent of what boot had be Movable besides.

    :param numa_aware: whether that has to hold on the memory's own node too.
    """
    prefix = "memory_hotplug.auto_movable"
    return Policy(f"{AUTO} {prefix}_ratio={ratio} {prefix}_numa_aware={numa_aware}", way)


POLICIES = {
    "online_movable": Policy("memhp_default_state=online_movable"),
    "memmap_on_memory": Policy(
        "memhp_default_state=online_movable memory_hotplug.memmap_on_memory=1"
    ),
    "online_kernel": Policy("memhp_default_state=online_kernel"),
    "301 %, DIMMs": auto_movable(301),
    "100 %, DIMMs": auto_movable(100),
    "50 %, DIMMs": auto_movable(50),
    "301 %, DIMMs, all nodes as one": auto_movable(301, numa_aware="N"),
    "100 %, in no group": auto_movable(100, without_group),
    "50 %, in no group": auto_movable(50, without_group),
    "100 %, virtio-mem of 128M": auto_movable(100, virtio_mem(128 << 20)),
    "50 %, virtio-mem of 128M": auto_movable(50, virtio_mem(128 << 20)),
    "100 %, virtio-mem of 512M": auto_movable(100, virtio_mem(512 << 20)),
}


def aged(policy: Policy) -> Machine:
    """Play the scenario on a machine with this policy."""
    data = copy.deepcopy(load_data(SCENARIO))
    data["machine"]["cmdline"] = policy.cmdline
    player = Player(check_scenario(data, SCENARIO.name))
    for step in player.scenario.steps:
        if step["op"] == "plug" and policy.way is not None:
            nid = player.m.pxm_to_node.get(step["node"], step["node"])
            policy.way(player.m, nid, step["addr"], step["size"])
            continue
        outcome = player.play(step)
        if outcome.error:
            raise SystemExit(f"{policy.cmdline}: {outcome.text}: {outcome.error}")
    return player.m


def take_away(m: Machine) -> tuple[int, int, int, int]:
    """Take offline what goes.

    :return: how many hot-plugged blocks are in a Movable zone, how many could go, how many went,
        of how many.
    """
    first = FIRST_ADDR // m.block_size
    blocks = sorted((b for b in m.memory_blocks if b >= first), reverse=True)
    zones = [m.memory_blocks[b].zone for b in blocks]
    movable = sum(zone is not None and zone.name == "Movable" for zone in zones)
    able = sum(m.explain_offline(block).can_go for block in blocks)
    gone = 0
    for block in blocks:
        try:
            m.write(f"/sys/devices/system/memory/memory{block}/state", "offline")
            gone += 1
        except KernelError:
            pass
    m.validate()
    return movable, able, gone, len(blocks)


def main() -> None:
    """Print a line for each policy."""
    print(f"{'policy':31} Movable  could go   went")
    for name, policy in POLICIES.items():
        movable, able, gone, total = take_away(aged(policy))
        shares = f"{movable / total:7.0%} {able / total:9.0%} {gone / total:6.0%}"
        print(f"{name:31} {shares}  of {total} blocks", flush=True)


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has had enough; what is left in the buffer has to go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
