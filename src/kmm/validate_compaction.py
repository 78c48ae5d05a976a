"""Recounts what compaction works with: what zones remember, indices, pages off their lists."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kmm import _compaction
from kmm.compaction import COMPACT_MAX_DEFER_SHIFT
from kmm.errors import ValidationError
from kmm.mmzone import Zone
from kmm.params import MAX_ORDER
from kmm.vmstat import node_items

if TYPE_CHECKING:
    from kmm.machine import Machine


def _true(ok: bool, what: str) -> None:
    if not ok:
        raise ValidationError(what)


def check_compaction(m: Machine) -> None:
    """Put-off compaction within its limits, indices as recounted, no page left isolated."""
    for zone in m.all_zones():
        if zone.populated:
            _check_state(zone)
            _check_indices(zone)
    for nid in sorted(m.n_memory):
        items = node_items(m, m.nodes[nid])
        for name in ("nr_isolated_anon", "nr_isolated_file"):
            _true(items[name] == 0, f"node {nid}: {name} {items[name]}, but nobody moves pages")


def _check_state(zone: Zone) -> None:
    where = f"node {zone.nid} {zone.name}: compact_"
    state = _compaction.compact_state(zone)
    shift, order = state["defer_shift"], state["order_failed"]
    _true(0 <= shift <= COMPACT_MAX_DEFER_SHIFT, f"{where}defer_shift {shift}")
    considered = state["considered"]
    _true(0 <= considered <= 1 << shift, f"{where}considered {considered} of {1 << shift}")
    _true(0 <= order <= MAX_ORDER, f"{where}order_failed {order}")


def _check_indices(zone: Zone) -> None:
    where = f"node {zone.nid} {zone.name}"
    counts = zone.nr_free()
    free = sum(n << o for o, n in enumerate(counts))
    for order in range(MAX_ORDER):
        large = sum(n << o for o, n in enumerate(counts) if o >= order)
        want = (free - large) * 100 // free if free else 0
        have = _compaction.extfrag_for_order(zone, order)
        _true(have == want, f"{where}: extfrag_for_order({order}) {have}, but recounted {want}")
        index = _compaction.fragmentation_index(zone, order)
        if large:
            _true(index == -1000, f"{where}: fragmentation_index({order}) {index} with such blocks")
        elif free:
            lacking = (1000 + free * 1000 // (1 << order)) // sum(counts)
            _true(index == 1000 - lacking, f"{where}: fragmentation_index({order}) {index}")
