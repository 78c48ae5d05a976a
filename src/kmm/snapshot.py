"""A machine's whole state as plain values, for comparing two moments of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kmm.mmzone import Zone
from kmm.params import MAX_ORDER, MIGRATE_TYPES, PAGEBLOCK_NR_PAGES
from kmm.resource import dump as dump_resources
from kmm.sparse import SECTION_IS_ONLINE

if TYPE_CHECKING:
    from kmm.machine import Machine

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
    "lowmem_reserve",
    "pageset_high",
    "pageset_batch",
    "stat_threshold",
)


def dump_zone(zone: Zone) -> dict[str, Any]:
    """Counters, free lists in list order, and per-CPU lists of a zone."""
    out: dict[str, Any] = {name: getattr(zone, name) for name in _ZONE_FIELDS}
    out["free"] = {
        (order, mt): zone.free_list(order, mt)
        for order in range(MAX_ORDER)
        for mt in range(MIGRATE_TYPES)
        if zone.free_counts()[mt][order]
    }
    out["pcp"] = [
        (zone.pcp_state(cpu), [zone.pcp_list(cpu, i) for i in range(14)])
        for cpu in range(_cpus(zone))
    ]
    return out


def _cpus(zone: Zone) -> int:
    return zone.nr_cpus


def _records(m: Machine) -> dict[str, Any]:
    """Section records, and pageblock and page records where something was written."""
    present = np.flatnonzero(m.sections["flags"])
    # The struct pages of an offline section are stale, in the kernel as here: nobody looks.
    online = m.sections["flags"][present] & SECTION_IS_ONLINE != 0
    kept = m.sections[present]
    kept["pageblock_flags"][~online] = 0
    sections = present[online]
    blocks = (sections[:, None] * 64 + np.arange(64)).reshape(-1)
    state = m.pageblocks["state"][blocks]
    dirty = blocks[state & 0x80 != 0]
    pages = {}
    for block in dirty.tolist():
        first = block * PAGEBLOCK_NR_PAGES
        rows = m.memmap[first : first + PAGEBLOCK_NR_PAGES]
        if rows["flags"].any() or rows["refcount"].any():
            pages[block] = (rows["flags"].tobytes(), rows["refcount"].tobytes())
    plain = m.pageblocks[blocks].copy()
    plain["state"] &= 0x7F
    # Lists are dumped with their zones; of the links in the records some are stale.
    plain["next"] = plain["prev"] = 0
    return {
        "sections": (present.tobytes(), kept.tobytes()),
        "pageblocks": plain.tobytes(),
        "pages": pages,
        "vmemmap": (
            np.flatnonzero(m.vmemmap_users).tobytes(),
            m.vmemmap_users[m.vmemmap_users != 0].tobytes(),
            m.vmemmap_pfn[m.vmemmap_users != 0].tobytes(),
            {k: dict(v) for k, v in m.vmemmap_basepages.items()},
            {k: tuple(v) for k, v in m.vmemmap_tables.items()},
        ),
    }


def dump(m: Machine) -> dict[str, Any]:
    """Return everything that a refused operation has to leave as it was.

    Logs, uevents, _OST answers and the total that the last rebuild of zonelists printed
    are history, not state; max_pfn and the policy zone never fall.  They are left out.
    """
    groups = {
        g.mgid: (
            g.nid,
            g.is_dynamic,
            g.max_pages,
            g.unit_pages,
            g.present_kernel_pages,
            g.present_movable_pages,
            frozenset(g.blocks),
        )
        for g in m.memory_groups.values()
    }
    blocks = {
        b.block_id: (
            b.state,
            b.nid,
            b.online_type,
            b.zone.index if b.zone else None,
            b.nr_vmemmap_pages,
            b.nodes,
            b.firmware_node,
            b.group.mgid if b.group else None,
        )
        for b in m.memory_blocks.values()
    }
    nodes = {
        p.node_id: (
            p.node_start_pfn,
            p.node_spanned_pages,
            p.node_present_pages,
            p.totalreserve_pages if p.node_id in m.n_online else 0,
            [z.index for z in p.zonelist] if p.node_id in m.n_online else None,
        )
        for p in m.nodes.values()
    }
    return {
        "iomem": dump_resources(m.iomem_resource),
        "left_behind": (set(m.ram_left_behind), set(m.nodes_left_behind)),
        "firmware_map": dict(m.firmware_map),
        "blocks": blocks,
        "groups": groups,
        "nodes": nodes,
        "states": (set(m.n_online), set(m.n_memory), set(m.n_normal_memory), set(m.node_devices)),
        "zones": {z.index: dump_zone(z) for z in m.all_zones()},
        "records": _records(m),
        "totals": (m.totalram_pages, m.totalreserve_pages, m.ratelimit_pages, m.vm.min_free_kbytes),
        "tunables": repr(m.vm),
        "policy": (
            m.mhp_default_online_type,
            m.online_policy,
            m.auto_movable_ratio,
            m.auto_movable_numa_aware,
            m.acpi_memory_enabled,
            m.memmap_engine.grouping_disabled,
            dict(m.notifier_errors),
        ),
        "acpi": [
            (d.name, d.attached, d.enumerated, d.mgid, tuple(d.physical_nodes.items()), d.offlined)
            for d in (*m.acpi_devices, *m.acpi_containers.values())
        ],
        "kthreads": set(m.kthreads),
        "cpuset": set(m.top_cpuset_mems),
        "dimms": {d.dimm_id: (d.addr, d.size, d.slot) for d in m.dimms.values()},
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
