"""A machine's whole state as plain values, for comparing two moments of it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from kmm.mmzone import MemoryGroup, PgData, Zone
from kmm.params import MAX_ORDER, MIGRATE_TYPES, PAGEBLOCK_NR_PAGES, STATE_BUDDY, STATE_PCP
from kmm.resource import dump as dump_resources
from kmm.sparse import SECTION_IS_ONLINE, chunks_seen, sections_seen
from kmm.used_pages import LRU_NAMES, NR_LRU_LISTS, live_entries, used_pages
from kmm.vmstat import node_items, zone_items

if TYPE_CHECKING:
    from kmm.acpi_memhotplug import AcpiDevice
    from kmm.hugetlb import HState
    from kmm.machine import Machine
    from kmm.memory import User
    from kmm.memory_block import MemoryBlock

_ZONE_FIELDS = (
    "zone_start_pfn",
    "spanned_pages",
    "present_pages",
    "present_early_pages",
    "managed_pages",
    "nr_free_pages",
    "nr_isolate_pageblock",
    "nr_reserved_highatomic",
    "watermark_min",
    "watermark_low",
    "watermark_high",
    "watermark_boost",
    "boost_factor",
    "lowmem_reserve",
    "pageset_high",
    "pageset_batch",
    "stat_threshold",
)


def dump_zone(zone: Zone) -> dict[str, Any]:
    """Counters, free lists in list order, and per-CPU lists of a zone."""
    out: dict[str, Any] = {name: getattr(zone, name) for name in _ZONE_FIELDS}
    out["vmstat"] = zone_items(zone)
    out["free"] = {
        (order, mt): zone.free_list(order, mt)
        for order in range(MAX_ORDER)
        for mt in range(MIGRATE_TYPES)
        if zone.free_counts()[mt][order]
    }
    out["pcp"] = [
        (zone.pcp_state(cpu), [zone.pcp_list(cpu, i) for i in range(14)])
        for cpu in range(zone.nr_cpus)
    ]
    return out


def _records(m: Machine) -> dict[str, Any]:
    """Section records, and pageblock and page records where something was written."""
    present = np.flatnonzero(sections_seen(m)["flags"])
    # The struct pages of an offline section are stale, in the kernel as here: nobody looks.
    online = m.sections["flags"][present] & SECTION_IS_ONLINE != 0
    kept = m.sections[present]
    types = kept["pageblock_flags"][online].tobytes()
    kept["pageblock_flags"] = 0
    sections = present[online]
    blocks = (sections[:, None] * 64 + np.arange(64)).reshape(-1)
    state = m.pageblocks["state"][blocks]
    dirty = blocks[state & 0x80 != 0]
    pages = {}
    for block in dirty.tolist():
        first = block * PAGEBLOCK_NR_PAGES
        here = slice(first, first + PAGEBLOCK_NR_PAGES)
        flags, states = m.memmap["flags"][here], m.page_states[here]
        # Free blocks are dumped with the lists that they are on.
        held = np.where(states & (STATE_BUDDY | STATE_PCP), 0, states)
        if flags.any() or held.any():
            pages[block] = (flags.tobytes(), held.tobytes())
    plain = m.pageblocks[blocks].copy()
    plain["state"] &= 0x7F
    # Lists are dumped with their zones; of the links in the records some are stale.
    plain["next"] = plain["prev"] = 0
    return {
        "sections": (present.tobytes(), kept.tobytes()),
        "types": types,
        "pageblocks": plain.tobytes(),
        "pages": pages,
    }


def _vmemmap(m: Machine) -> dict[str, Any]:
    used = np.flatnonzero(m.vmemmap_users[chunks_seen(m)])
    return {
        "users": dict(zip(used.tolist(), m.vmemmap_users[used].tolist(), strict=True)),
        "pages": dict(zip(used.tolist(), m.vmemmap_pfn[used].tolist(), strict=True)),
        "basepages": copy.deepcopy(m.vmemmap_basepages),
        "tables": copy.deepcopy(m.vmemmap_tables),
    }


def _group(g: MemoryGroup) -> dict[str, Any]:
    return {
        "nid": g.nid,
        "is_dynamic": g.is_dynamic,
        "max_pages": g.max_pages,
        "unit_pages": g.unit_pages,
        "present": (g.present_kernel_pages, g.present_movable_pages),
        "blocks": frozenset(g.blocks),
    }


def _block(b: MemoryBlock) -> dict[str, Any]:
    return {
        "state": b.state,
        "nid": b.nid,
        "online_type": b.online_type,
        "zone": b.zone.index if b.zone else None,
        "nr_vmemmap_pages": b.nr_vmemmap_pages,
        "nodes": b.nodes,
        "firmware_node": b.firmware_node,
        "group": b.group.mgid if b.group else None,
    }


def _node(m: Machine, p: PgData) -> dict[str, Any]:
    out: dict[str, Any] = {
        "span": (p.node_start_pfn, p.node_spanned_pages),
        "present": p.node_present_pages,
    }
    if p.node_id in m.n_online:  # what an absent node says of itself is made anew when it comes
        out["vmstat"] = node_items(m, p)
        out["totalreserve_pages"] = p.totalreserve_pages
        out["zonelist"] = [z.index for z in p.zonelist]
        out["nofallback"] = [z.index for z in p.nofallback]
        out["fallback_order"] = list(p.fallback_order)
    return out


def _device(d: AcpiDevice) -> dict[str, Any]:
    return {
        "children": [c.name for c in d.children],
        "attached": d.attached,
        "enumerated": d.enumerated,
        "mgid": d.mgid,
        "ranges": [(info.start_addr, info.length, info.enabled) for info in d.res_list],
        "physical_nodes": dict(d.physical_nodes),
        "offlined": d.offlined,
    }


def _dimms(m: Machine) -> dict[str, Any]:
    """What is plugged, which a kernel that does not want it leaves in its slot."""
    return {
        "plugged": {d.dimm_id: repr(d) for d in m.dimms.values()},
        "slots": [d.dimm.dimm_id if d.dimm else None for d in m.acpi_devices],
        "backends": frozenset(m.dimm_backends or ()),
    }


def _policy(m: Machine) -> dict[str, Any]:
    return {
        "default_online_type": m.mhp_default_online_type,
        "online_policy": m.online_policy,
        "auto_movable_ratio": m.auto_movable_ratio,
        "auto_movable_numa_aware": m.auto_movable_numa_aware,
        "acpi_memory_enabled": m.acpi_memory_enabled,
        "grouping_disabled": m.memmap_engine.grouping_disabled,
        "notifier_errors": dict(m.notifier_errors),
        "tunables": repr(m.vm),
        "files": dict(m.sysfs_values),
    }


def _totals(m: Machine) -> dict[str, Any]:
    return {
        "totalram_pages": m.totalram_pages,
        "totalreserve_pages": m.totalreserve_pages,
        "ratelimit_pages": m.ratelimit_pages,
        "num_poisoned_pages": m.num_poisoned_pages,
        "hwpoison": frozenset(m.hwpoison),
        "numa_meminfo": list(m.numa_meminfo),
    }


def _user(m: Machine, user: User) -> dict[str, Any]:
    """What a user has where, and what it holds."""
    engine = user.engine
    there = np.flatnonzero(engine.slots[: engine.nr_slots])
    out: dict[str, Any] = {
        "kind": (user.kind, engine.order, engine.mapped, engine.locked),
        "pages": (engine.nr_slots, engine.nr_present, engine.nr_swapped),
        "slots": (there.tobytes(), engine.slots[there].tobytes()),
    }
    if engine.tokens:
        out["tokens"] = engine.read_tokens(0, engine.nr_slots).tobytes()
    return out


def _lru(m: Machine) -> dict[str, Any]:
    """Nodes' LRU lists in their order; the pages that are only counted are with their users."""
    pages, _ = used_pages(m)
    return {
        f"node {nid} {LRU_NAMES[lru]}": pages.pfn[live_entries(m, pages, nid, lru)[0]].tobytes()
        for nid in m.nodes
        for lru in range(NR_LRU_LISTS)
    }


def _pool(h: HState) -> dict[str, Any]:
    """A pool's counts, and its free pages by node in their order."""
    names = ("resv_huge_pages", "max_huge_pages", "nr_overcommit_huge_pages")
    turns = ("next_nid_to_alloc", "next_nid_to_free")
    out: dict[str, Any] = {name: getattr(h, name) for name in (*names, *turns)}
    out["nr"] = dict(h.nr_huge_pages_node)
    out["surplus"] = dict(h.surplus_huge_pages_node)
    out["free"] = {nid: list(pages) for nid, pages in h.free.items()}
    return out


def dump(m: Machine) -> dict[str, Any]:
    """Return everything that a refused operation has to leave as it was.

    Logs, uevents, _OST answers and the total that the last rebuild of zonelists printed
    are history, not state; max_pfn, a node's nr_zones and the policy zone never fall.  They are
    left out.
    """
    devices = (*m.acpi_devices, *m.acpi_containers.values())
    return {
        "iomem": dump_resources(m.iomem_resource),
        "left_behind": (set(m.ram_left_behind), set(m.nodes_left_behind)),
        "firmware_map": {"entries": dict(m.firmware_map), "next": m.firmware_map_next},
        "acpi": {d.name: _device(d) for d in devices},
        "dimms": _dimms(m),
        "dax": {d.name: (d.driver, d.mgid) for d in m.dax_devices.values()},
        "dax ids": {d.name: set(d.ids) for d in m.dax_drivers.values()},
        "blocks": {b.block_id: _block(b) for b in m.memory_blocks.values()},
        "groups": {g.mgid: _group(g) for g in m.memory_groups.values()},
        "nodes": {p.node_id: _node(m, p) for p in m.nodes.values()},
        "states": {
            "online": set(m.n_online),
            "memory": set(m.n_memory),
            "normal_memory": set(m.n_normal_memory),
            "devices": set(m.node_devices),
            "cpuset": set(m.top_cpuset_mems),
            "kthreads": set(m.kthreads),
        },
        "zones": {z.index: dump_zone(z) for z in m.all_zones()},
        "records": _records(m),
        "vmemmap": _vmemmap(m),
        "users": {name: _user(m, user) for name, user in m.users.items()},
        "lru": _lru(m),
        "totals": _totals(m),
        "hugetlb": {h.name: _pool(h) for h in m.hstates},
        "policy": _policy(m),
        "pins": {repr(pin) for pins in m.pins.values() for pin in pins},
    }


def differences(before: dict[str, Any], after: dict[str, Any], path: str = "") -> list[str]:
    """Return where two dumps differ, one line each."""
    out: list[str] = []
    for key in sorted(set(before) | set(after), key=str):
        a, b = before.get(key), after.get(key)
        where = f"{path}/{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            out += differences(a, b, where)
        elif a != b:
            out.append(f"{where}: {str(a)[:200]} -> {str(b)[:200]}")
    return out
