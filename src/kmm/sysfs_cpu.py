"""/sys/devices/system/cpu as far as links from nodes lead (drivers/base/cpu.c)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from kmm.params import format_list
from kmm.sysfs_entry import NUMBER, Entry, directory, link, numbered, readonly

if TYPE_CHECKING:
    from kmm.machine import Machine

CPU = "/sys/devices/system/cpu"
_MASKS = ("online", "possible", "present")


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
    return directory(["subsystem", *([] if nid is None else [f"node{nid}"])])


def _cpu_file(m: Machine, match: re.Match[str]) -> Entry | None:
    cpu, name = int(match[1]), match[2]
    if name == "subsystem":
        return link("../../../../bus/cpu")
    nid = numbered("node", name)
    return link(f"../../node/{name}") if nid is not None and nid == _node_of(m, cpu) else None


ENTRIES = (
    (CPU, lambda m, _: directory([*_MASKS, *names(m)])),
    (rf"{CPU}/(?:{'|'.join(_MASKS)})", _mask),
    (rf"{CPU}/cpu{NUMBER}", _cpu_dir),
    (rf"{CPU}/cpu{NUMBER}/(\w+)", _cpu_file),
)
