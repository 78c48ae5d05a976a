"""Nodes as devices and node states (drivers/base/node.c, mm/memory_hotplug.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kmm.memory_block import MemoryBlock, walk_memory_blocks
from kmm.trace import traced

if TYPE_CHECKING:
    from kmm.machine import Machine


@traced
def __register_one_node(m: Machine, nid: int) -> None:
    """Create a node's directory and announce it."""
    m.node_devices.add(nid)
    m.uevent("add", f"/devices/system/node/node{nid}", "node")


register_one_node = __register_one_node


@traced
def node_set_online(m: Machine, nid: int) -> None:
    """Mark a node online."""
    m.set_node_online(nid)


@traced
def unregister_one_node(m: Machine, nid: int) -> None:
    """Remove a node's directory."""
    m.node_devices.discard(nid)
    m.uevent("remove", f"/devices/system/node/node{nid}", "node")


@traced
def register_memory_blocks_under_node(m: Machine, nid: int, start: int, size: int) -> None:
    """Link the blocks of a range of bytes with their node."""

    def link(block: MemoryBlock) -> None:
        block.nid = nid
        block.nodes = (nid,)

    walk_memory_blocks(m, start, size, link)


def node_states_text(m: Machine) -> dict[str, set[int]]:
    """Return the node masks that /sys/devices/system/node shows, by file name."""
    return {
        "possible": set(m.nodes),
        "online": m.n_online,
        "has_normal_memory": m.n_normal_memory,
        "has_memory": m.n_memory,
        "has_cpu": {nid for nid in m.nodes if m.cpus_of_node(nid)},
        "has_generic_initiator": set(),
    }


@traced
def kswapd_run(m: Machine, nid: int) -> None:
    """Start a node's kswapd if it does not run."""
    m.kthreads.add(f"kswapd{nid}")


@traced
def kcompactd_run(m: Machine, nid: int) -> None:
    """Start a node's kcompactd if it does not run."""
    m.kthreads.add(f"kcompactd{nid}")


@traced
def kcompactd_stop(m: Machine, nid: int) -> None:
    """Stop a node's kcompactd."""
    m.kthreads.discard(f"kcompactd{nid}")


@traced
def kswapd_stop(m: Machine, nid: int) -> None:
    """Stop a node's kswapd."""
    m.kthreads.discard(f"kswapd{nid}")
