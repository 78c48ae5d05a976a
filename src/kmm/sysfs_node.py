"""/sys/devices/system/node (drivers/base/node.c)."""

from __future__ import annotations

import re
from itertools import chain
from typing import TYPE_CHECKING

from kmm import procfs
from kmm.compaction import compact_node
from kmm.node import node_states_text
from kmm.params import format_list
from kmm.sysfs_cpu import cpumap
from kmm.sysfs_entry import (
    NUMBER,
    POWER,
    Entry,
    cpulist,
    directory,
    link,
    numbered,
    power_file,
    readonly,
    uevent_file,
)
from kmm.vmstat import node_numastat, node_vmstat

if TYPE_CHECKING:
    from kmm.machine import Machine

NODE = "/sys/devices/system/node"


def _node_mask(m: Machine, match: re.Match[str]) -> Entry | None:
    if match[1] == "uevent":
        return uevent_file("/devices/system/node", "node")
    if match[1] not in node_states_text(m):
        return None
    return readonly(lambda m: format_list(sorted(node_states_text(m)[match[1]])) + "\n")


def _distance(m: Machine, nid: int) -> str:
    return " ".join(str(m.node_distance(nid, n)) for n in sorted(m.n_online)) + "\n"


def _node_file(m: Machine, match: re.Match[str]) -> Entry | None:
    nid, name = int(match[1]), match[2]
    if nid not in m.node_devices:
        return None
    shows = {
        "cpumap": lambda m: cpumap(m.cpus_of_node(nid), m.nr_cpus),
        "distance": lambda m: _distance(m, nid),
        "meminfo": lambda m: procfs.node_meminfo(m, nid),
        "numastat": lambda m: node_numastat(m, m.nodes[nid]),
        "vmstat": lambda m: node_vmstat(m, m.nodes[nid]),
    }
    if name in shows:
        return readonly(shows[name])
    if name == "cpulist":
        return cpulist(lambda m: format_list(m.cpus_of_node(nid)) + "\n")
    if name == "x86":  # for encrypted memory, which the machine has none of
        return directory(())
    if name == "compact":
        return Entry(0o200, write=lambda m, t: compact_node(m, nid))
    if name == "uevent":
        return uevent_file(f"/devices/system/node/node{nid}", "node")
    if name == "subsystem":
        return link("../../../../bus/node")
    if name == "power":
        return directory(POWER)
    block = m.memory_blocks.get(numbered("memory", name) or 0)
    if block is not None and name == f"memory{block.block_id}":
        return link(f"../../memory/{name}") if nid in block.nodes else None
    if numbered("cpu", name) in m.cpus_of_node(nid):
        return link(f"../../cpu/{name}")
    return None


def _node_dir(m: Machine, match: re.Match[str]) -> Entry | None:
    nid = int(match[1])
    if nid not in m.node_devices:
        return None
    names = [
        "compact",
        "cpulist",
        "cpumap",
        "distance",
        "hugepages",
        "meminfo",
        "numastat",
        "power",
        "subsystem",
        "uevent",
        "vmstat",
        "x86",
    ]
    names += [f"cpu{c}" for c in m.cpus_of_node(nid)]
    blocks = (f"memory{b.block_id}" for b in m.memory_blocks.values() if nid in b.nodes)
    return directory(chain(names, blocks))


ENTRIES = (
    (
        NODE,
        lambda m, _: directory(
            [*node_states_text(m), "uevent", "power", *(f"node{n}" for n in m.node_devices)]
        ),
    ),
    (rf"{NODE}/power", lambda m, _: directory(POWER)),
    (rf"({NODE}(?:/node[0-9]+)?)/power/(\w+)", power_file),
    (rf"{NODE}/node{NUMBER}", _node_dir),
    (rf"{NODE}/(\w+)", _node_mask),
    (rf"{NODE}/node{NUMBER}/(\w+)", _node_file),
)
