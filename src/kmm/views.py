"""What the memory looks like, layer by layer, with the changes since the last look marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kmm.mmzone import PgData
from kmm.node import node_states_text
from kmm.params import PAGEBLOCK_ORDER, PAGES_PER_SECTION, PMD_SIZE, ZONE_NAMES, format_list
from kmm.resource import iomem_show
from kmm.sparse import (
    SECTION_IS_EARLY,
    SECTION_IS_ONLINE,
    SECTION_MARKED_PRESENT,
    VMEMMAP_NOT_OURS,
    sections_seen,
)
from kmm.symbols import display
from kmm.wording import counted, sized

if TYPE_CHECKING:
    from kmm.machine import Machine

Layer = tuple[str, list[str]]


def runs(numbers: Sequence[int]) -> str:
    """Return numbers as a list of ranges, ``none`` if there are none."""
    return format_list(numbers) or "none"


def _spans(numbers: npt.NDArray[np.int64]) -> str:
    """Return ascending numbers as runs does; a large machine has half a million sections."""
    cuts = np.flatnonzero(np.diff(numbers) != 1)
    firsts = numbers[np.concatenate(([0], cuts + 1))] if numbers.size else numbers
    lasts = numbers[np.concatenate((cuts, [numbers.size - 1]))] if numbers.size else numbers
    pairs = zip(firsts.tolist(), lasts.tolist(), strict=True)
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in pairs) or "none"


def _resources(m: Machine) -> list[str]:
    """Return RAM and what lies inside it; the rest of the address map is only counted."""
    out, others, inside = [], 0, False
    for line in iomem_show(m.iomem_resource).splitlines():
        inside = "System RAM" in line or (inside and line.startswith(" "))
        if inside:
            out.append(line)
        else:
            others += 1
    return [*out, f"and {counted(others, 'other')}, see /proc/iomem"]


def _memmap_places(
    m: Machine, sections: npt.NDArray[np.int64]
) -> list[tuple[str, npt.NDArray[np.int64]]]:
    """Tell by where the pages lie that hold their memmap, which sections those are."""
    chunks = sections * PAGES_PER_SECTION * m.config.struct_page_size // PMD_SIZE
    pfns = m.vmemmap_pfn[chunks]
    by_page = np.isin(chunks, np.array(list(m.vmemmap_basepages), dtype=np.int64))
    for i in np.flatnonzero(by_page).tolist():
        pfns[i] = next(iter(m.vmemmap_basepages[int(chunks[i])].values()))
    own = pfns & np.uint64(VMEMMAP_NOT_OURS) != 0
    # A key for each place: 0 at boot, 1 in the block itself, else zone and whether page by page.
    zones = m.pageblocks["zone"][np.where(own, 0, pfns >> np.uint64(PAGEBLOCK_ORDER))]
    keys = np.where(own | (zones == 0), 1, 2 * zones.astype(np.int64) + by_page)
    keys[m.sections["flags"][sections] & SECTION_IS_EARLY != 0] = 0
    found, first = np.unique(keys, return_index=True)
    out = []
    for key in found[np.argsort(first)].tolist():
        name = ("taken at boot", "in the block itself")[key] if key < 2 else ""
        if not name:
            zone = m.all_zones()[key // 2 - 1]
            name = f"in node {zone.nid} {zone.name}" + (", page by page" if key % 2 else "")
        out.append((name, sections[keys == key]))
    return out


def _sections(m: Machine) -> list[str]:
    flags = sections_seen(m)["flags"]
    present = np.flatnonzero(flags & SECTION_MARKED_PRESENT)
    online = np.flatnonzero(flags & SECTION_IS_ONLINE)
    early = np.flatnonzero(flags & SECTION_IS_EARLY)
    out = [
        f"sections of {PAGES_PER_SECTION} pages present: {_spans(present)}",
        f"online: {_spans(online)}",
        f"early: {_spans(early)}",
    ]
    return out + [f"memmap {name}: {_spans(some)}" for name, some in _memmap_places(m, present)]


def _node(m: Machine, pgdat: PgData) -> list[str]:
    nid = pgdat.node_id
    state = "online" if nid in m.n_online else "possible, not online"
    order = " ".join(map(str, pgdat.fallback_order)) or "not built"
    return [
        f"node {nid}: {state}, start_pfn {pgdat.node_start_pfn}, spanned "
        f"{pgdat.node_spanned_pages}, present {pgdat.node_present_pages}, fallback order {order}"
    ]


def _zones(m: Machine) -> list[str]:
    out = []
    for zone in m.all_zones():
        if zone.spanned_pages:
            out.append(
                f"node {zone.nid} {zone.name + ':':<8} start_pfn {zone.zone_start_pfn} spanned "
                f"{zone.spanned_pages} present {zone.present_pages} managed {zone.managed_pages} "
                f"free {zone.nr_free_pages} min/low/high {zone.min_wmark_pages()}/"
                f"{zone.low_wmark_pages()}/{zone.high_wmark_pages()}"
            )
    return out


def _buddy(m: Machine) -> list[str]:
    return [
        f"node {z.nid} {z.name + ':':<8} " + " ".join(f"{n:>5}" for n in z.nr_free())
        for z in m.all_zones()
        if z.populated
    ]


def _accounting(m: Machine) -> list[str]:
    return [
        f"MemTotal {m.totalram_pages * 4} kB, total pages at the last rebuild {m.vm_total_pages}",
        f"min_free_kbytes {m.vm.min_free_kbytes}, reserved {m.totalreserve_pages} pages",
        f"writeback ratelimit {m.ratelimit_pages} pages, max_pfn {m.max_pfn:#x}",
        f"policy zone {ZONE_NAMES[m.policy_zone]}",
    ]


def _blocks(m: Machine) -> list[str]:
    out: list[str] = []
    group: list[int] = []
    label = ""

    def flush() -> None:
        if group:
            out.append(f"memory{runs(group)}: {label}")

    for block_id, block in sorted(m.memory_blocks.items()):
        zone = f", zone {block.zone.name}" if block.zone is not None else ""
        text = f"{block.state}{zone}, node {'-'.join(map(str, block.nodes)) or '?'}"
        if group and (text != label or block_id != group[-1] + 1):
            flush()
            group = []
        label = text
        group.append(block_id)
    flush()
    return out


def layers(m: Machine) -> list[Layer]:
    """Return the layers of a machine from the address map up to what user space sees."""
    states = node_states_text(m)
    return [
        ("resource tree", _resources(m)),
        ("nodes (pgdat)", [line for p in m.nodes.values() for line in _node(m, p)]),
        ("sections and memmap", _sections(m)),
        ("zones and watermarks (pages)", _zones(m)),
        ("buddy lists (free blocks of order 0 to 10)", _buddy(m)),
        ("global accounting", _accounting(m)),
        ("daemons", [" ".join(sorted(m.kthreads)) or "none"]),
        (f"sysfs memory blocks of {sized(m.block_size)}", _blocks(m)),
        ("sysfs nodes", [f"{k}: {runs(sorted(v))}" for k, v in states.items()]),
        ("cpuset", [f"mems.effective: {runs(sorted(m.top_cpuset_mems))}"]),
    ]


def _subject(line: str) -> str:
    """Return what a line is about, so that a line that changed is told from one that went."""
    if " : " in line:
        return line  # a resource is its range and name
    return line.partition(":")[0] if ":" in line else line.split(" ", 1)[0]


def _marked(now: list[str], before: list[str] | None) -> list[str]:
    """Return a layer's lines with a mark each; what is gone stands where it stood."""
    if before is None:
        return [f"    {line}" for line in now or ["none"]]
    subjects = {_subject(line) for line in now}
    gone = [line for line in before if _subject(line) not in subjects]
    place = {line: i for i, line in enumerate(before)}
    places = {_subject(line): i for i, line in enumerate(before)}
    out: list[str] = []
    for line in now:
        while gone and place[gone[0]] < places.get(_subject(line), 0):
            out.append(f"  - {gone.pop(0)}")
        out.append(f"  {' ' if line in place else '*'} {line}")
    return out + [f"  - {line}" for line in gone] or ["    none"]


def show(now: list[Layer], before: list[Layer] | None = None) -> str:
    """Return the layers as text.

    Lines that are new or say something new are marked with ``*``, lines about something that is
    no longer there with ``-``.
    """
    earlier = None if before is None else dict(before)
    out: list[str] = []
    for title, lines in now:
        out.append(title)
        out += _marked(lines, None if earlier is None else earlier.get(title, []))
    return "\n".join(out)


def call_tree(calls: Sequence[Sequence[object]], vocabulary: str = "6.1") -> str:
    """Return a recorded call chain as an indented tree.

    :param vocabulary: ``6.1`` or ``old``.
    """
    out = []
    for depth, name, times in calls:
        count = f" ×{times}" if int(str(times)) > 1 else ""
        out.append(f"    {'  ' * int(str(depth))}{display(str(name), vocabulary)}(){count}")
    return "\n".join(out)
