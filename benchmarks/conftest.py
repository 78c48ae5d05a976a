"""Machines that several benchmarks use, and resident memory beside time."""

from __future__ import annotations

from pathlib import Path

from kmm import Machine, MachineConfig

TIB, GIB, MIB = 1 << 40, 1 << 30, 1 << 20
START = 1 << 40


def resident_mib() -> float:
    """Resident memory of this process in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


def big_machine(block_size: int, memory: str, maxmem: str = "64T") -> Machine:
    """A machine whose second node takes terabytes, onlined as they come."""
    return Machine(
        MachineConfig.from_dict(
            {
                "memory": memory,
                "maxmem": maxmem,
                "cpus": 2,
                "nodes": [{"cpus": "0-1", "memory": memory}, {}],
                "cmdline": "memhp_default_state=online_movable",
                "block_size": block_size,
            }
        )
    )
