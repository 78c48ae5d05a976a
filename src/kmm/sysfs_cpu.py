"""/sys/devices/system/cpu: which CPUs there are, and how they lie (drivers/base/cpu.c, topology.c).

The CPUs are cores of one package with a thread each, as QEMU makes them; caches are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kmm.params import format_list
from kmm.sysfs_entry import NUMBER, Entry, cpulist, directory, link, numbered, readonly

if TYPE_CHECKING:
    from kmm.machine import Machine

CPU = "/sys/devices/system/cpu"
_MASKS = ("online", "possible", "present")
_FIXED = ("isolated", "kernel_max", "offline")
NR_CPUS = 8192  # the reference build's
BAD_APICID = 0xFFFF  # of the cluster, where the CPU tells of none


def cpumap(cpus: Iterable[int], width: int) -> str:
    """Return a mask of CPUs in the kernel's format, 32 at a time.

    :param width: CPUs that there can be.
    """
    mask = sum(1 << cpu for cpu in cpus)
    words = []
    while width > 0:
        words.append(f"{mask & 0xFFFFFFFF:0{-(-min(width, 32) // 4)}x}")
        mask, width = mask >> 32, width - 32
    return ",".join(reversed(words)) + "\n"


def names(m: Machine) -> Iterable[str]:
    """Return the names of the CPUs' directories."""
    return (f"cpu{c}" for c in range(m.nr_cpus))


def _node_of(m: Machine, cpu: int) -> int | None:
    return next((nid for nid in sorted(m.node_devices) if cpu in m.cpus_of_node(nid)), None)


def _mask(m: Machine, match: re.Match[str]) -> Entry:
    return readonly(lambda m: format_list(range(m.nr_cpus)) + "\n")


def _cpu_dir(m: Machine, match: re.Match[str]) -> Entry | None:
    cpu = int(match[1])
    if cpu >= m.nr_cpus:
        return None
    nid = _node_of(m, cpu)
    return directory(["subsystem", "topology", *([] if nid is None else [f"node{nid}"])])


def _cpu_file(m: Machine, match: re.Match[str]) -> Entry | None:
    cpu, name = int(match[1]), match[2]
    if name == "subsystem":
        return link("../../../../bus/cpu")
    nid = numbered("node", name)
    return link(f"../../node/{name}") if nid is not None and nid == _node_of(m, cpu) else None


def _topology(m: Machine, cpu: int) -> dict[str, str]:
    """The texts of a CPU's topology files."""
    out = {
        "core_id": f"{cpu}\n",
        "cluster_id": f"{BAD_APICID}\n",
        "die_id": "0\n",
        "physical_package_id": "0\n",
    }
    alone, together = (cpu,), range(m.nr_cpus)
    groups: dict[str, Sequence[int]]
    groups = {"cluster_cpus": alone, "core_cpus": alone, "thread_siblings": alone}
    groups |= {"core_siblings": together, "die_cpus": together, "package_cpus": together}
    for name, cpus in groups.items():
        out[name] = cpumap(cpus, m.nr_cpus)
        out[f"{name}_list"] = format_list(cpus) + "\n"
    return out


def _topology_file(m: Machine, match: re.Match[str]) -> Entry | None:
    cpu, name = int(match[1]), match[2]
    if cpu >= m.nr_cpus:
        return None
    texts = _topology(m, cpu)
    if name is None:
        return directory(texts)
    if name not in texts:
        return None
    kind = cpulist if name.endswith("_list") else readonly
    return kind(lambda m: texts[name])


def _fixed(m: Machine, match: re.Match[str]) -> Entry:
    # No CPU is offline, nor isolated; the highest number that the kernel could have is known.
    return readonly(lambda m: f"{NR_CPUS - 1}\n" if match[1] == "kernel_max" else "\n")


ENTRIES = (
    (CPU, lambda m, _: directory([*_MASKS, *_FIXED, *names(m)])),
    (rf"{CPU}/({'|'.join(_FIXED)})", _fixed),
    (rf"{CPU}/(?:{'|'.join(_MASKS)})", _mask),
    (rf"{CPU}/cpu{NUMBER}", _cpu_dir),
    (rf"{CPU}/cpu{NUMBER}/topology(?:/(\w+))?", _topology_file),
    (rf"{CPU}/cpu{NUMBER}/(\w+)", _cpu_file),
)
