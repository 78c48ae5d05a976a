"""validate() sees a machine that was tampered with, whatever was changed.

Every check of validate.py must be the one that stops at least one corrupted machine: the last
test compares the places that raised with the places that can.
"""

from __future__ import annotations

import ast
import functools
import re
import struct
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

import kmm.validate as validate_module
import kmm.validate_zone as zone_module
from kmm import Machine, ValidationError
from kmm.cpuset import CpuSet
from kmm.memory_block import MemoryBlock
from kmm.mmzone import MemoryGroup, Zone
from tests.conftest import DIMM, two_nodes


def built() -> Machine:
    m = two_nodes()
    m.plug("a", 1, DIMM, 512 << 20)
    m.write("/sys/devices/system/memory/memory32/state", "online_kernel")
    m.write("/sys/devices/system/memory/memory33/state", "online_movable")
    m.alloc_pages(nid=1)
    m.validate()
    return m


def normal(m: Machine):
    return m.nodes[1].zone(2)


def _set(attribute: str, delta: int) -> Callable[[Machine], None]:
    def change(m: Machine) -> None:
        setattr(normal(m), attribute, getattr(normal(m), attribute) + delta)

    return change


def _resource_overlap(m: Machine) -> None:
    m.iomem_resource.root.children[-2].end += 1 << 40


def _resource_gone(m: Machine) -> None:
    res = next(r for _, r in m.iomem_resource.walk() if r.start == DIMM)
    res.start += 256 << 20


def _resource_without_block(m: Machine) -> None:
    res = next(r for _, r in m.iomem_resource.walk() if r.start == DIMM)
    res.end += 128 << 20


def _section_offline(m: Machine) -> None:
    m.sections["flags"][32] &= 3


def _section_without_memmap(m: Machine) -> None:
    m.sections["flags"][34] = 1


def _stray_section(m: Machine) -> None:
    m.sections["flags"][20] = 3


def _no_subsections(m: Machine) -> None:
    m.sections["subsection_map"][34] = 0


def _lost_free_block(m: Machine) -> None:
    m.pageblocks["kind"][(DIMM >> 21) + 20] = 0


def _wrong_free_type(m: Machine) -> None:
    m.pageblocks["mt"][(DIMM >> 21) + 20] = 2


def _isolated(m: Machine) -> None:
    normal(m).nr_isolate_pageblock = 1


def _page_zone(m: Machine) -> None:
    m.pageblocks["zone"][(DIMM >> 21)] = 1


def _pcp_size(m: Machine) -> None:
    normal(m).pageset_update(5, 1, False)


def _block_state(m: Machine) -> None:
    m.memory_blocks[34].state = "going-offline"


def _block_id(m: Machine) -> None:
    m.memory_blocks[34].block_id = 44


def _offline_block_in_zone(m: Machine) -> None:
    m.memory_blocks[34].zone = normal(m)


def _block_on_absent_node(m: Machine) -> None:
    m.memory_blocks[34].nodes = (1, 5)


def _block_without_section(m: Machine) -> None:
    m.memory_blocks[90] = MemoryBlock(90, "offline", 1, nodes=(1,))


def _group_count(m: Machine) -> None:
    m.memory_groups[0].present_movable_pages += 512


def _group_member(m: Machine) -> None:
    m.memory_groups[0].blocks.discard(32)


def _cpuset_nodes(m: Machine) -> None:
    CpuSet(m, "group", [1]).effective_mems = frozenset({0})


def _node_present(m: Machine) -> None:
    m.nodes[1].node_present_pages -= 1


def _node_span(m: Machine) -> None:
    m.nodes[1].node_spanned_pages += 512


def _raw(zone: Zone, part: int, find: bytes, put: bytes) -> None:
    """Overwrite bytes of a zone's C struct (part 0) or of its per-CPU lists (part 1)."""
    saved = list(zone.save())
    at = saved[part].index(find)
    saved[part] = saved[part][:at] + put + saved[part][at + len(put) :]
    zone.restore(tuple(saved))


def _free_mask(m: Machine) -> None:
    """The zone says that it has no movable block of order 0, and has one."""
    masks = normal(m).free_masks()
    changed = list(masks)
    changed[1] ^= 1
    _raw(normal(m), 0, struct.pack("5I", *masks), struct.pack("5I", *changed))


def _pcp_count(m: Machine) -> None:
    """One page more on the first CPU's count."""
    state = normal(m).pcp_state(0)
    _raw(normal(m), 1, struct.pack("4i", *state), struct.pack("i", state[0] + 1))


def _pcp_moved(m: Machine) -> None:
    """One page more on the first CPU's count, one fewer on the second's."""
    zone = normal(m)
    first, second = zone.pcp_state(0), zone.pcp_state(1)
    saved = zone.save()
    size = len(saved[1]) // 2
    lists = struct.pack("i", first[0] + 1) + saved[1][4:size]
    lists += struct.pack("i", second[0] - 1) + saved[1][size + 4 :]
    zone.restore((saved[0], lists))


def _relink(zone: Zone, m: Machine, to: Callable[[list[int]], int]) -> None:
    """Let the last but one block of order 10 point elsewhere than to the last."""
    pfns = zone.free_list(10, 1)
    m.pageblocks["next"][pfns[-2] >> 9] = to(pfns) >> 9


def _stale_span(m: Machine) -> None:
    zone = m.nodes[1].zone(1)
    zone.zone_start_pfn, zone.spanned_pages = DIMM >> 12, 512


def _wide_span(m: Machine, before: int) -> None:
    # Memory of a neighbour inside the span is allowed, at its ends it is not.
    zone = normal(m)
    zone.zone_start_pfn -= before
    zone.spanned_pages += 512


def _drop_memmap(m: Machine) -> None:
    pfn = int(m.vmemmap_pfn[(DIMM >> 12) * 64 >> 21])
    m.free_pages(pfn, 9)


def _chunk(m: Machine, array: str, value: int) -> None:
    getattr(m, array)[(DIMM >> 12) * 64 >> 21] = value


def _shown(m: Machine, call: str, path: str, text: object) -> None:
    """Let a file or directory of the machine show something else."""
    real = getattr(m, call)
    setattr(m, call, lambda p: text if p == path else real(p))


def _wipe_page(m: Machine) -> None:
    pfn = m.alloc_pages(0, 0xCC0, 1)
    m.page_states[pfn] = 0


def _wipe_block(m: Machine) -> None:
    m.pageblocks["kind"][m.alloc_pages(9, 0xCC0, 1) >> 9] = 0


def _two_small_ones(m: Machine) -> int:
    """Make a list of two free pages; return the second."""
    pfns = m.alloc_pages_bulk(512, 0, 0x100CCA, 1)
    m.free_pages_bulk(pfns[:4:2])
    for zone in m.nodes[1].zones:
        zone.drain()
    lists = [z.free_list(0, 1) for z in m.nodes[1].zones]
    return next(pfns[1] for pfns in lists if len(pfns) > 1)


def _reserve_of(m: Machine) -> None:
    zone = m.nodes[0].zone(0)
    zone.lowmem_reserve = (0, *(n + 1 for n in zone.lowmem_reserve[1:]))


def _reserve_of_node(m: Machine) -> None:
    m.nodes[1].totalreserve_pages += 1
    m.totalreserve_pages += 1


def _other_group(m: Machine) -> None:
    m.memory_groups[1] = MemoryGroup(1, 1, False, max_pages=1)
    m.acpi_devices[0].mgid = 1


def _uncounted(m: Machine) -> None:
    m.write(SYSFS + "memory/hard_offline_page", hex(DIMM + (64 << 20)))
    m.num_poisoned_pages = 0


SYSFS = "/sys/devices/system/"


CORRUPTIONS: dict[str, tuple[Callable[[Machine], object], str]] = {
    # the resource tree
    "resource overlap": (
        _resource_overlap,
        "resource 0xfd00000000-.*: overlaps the one before it",
    ),
    "resource shrunk": (_resource_gone, "memory32: 0 of its pages are System RAM"),
    "resource without block": (_resource_without_block, "System RAM .*: no memory36"),
    # sections and memmap
    "section offline": (_section_offline, "section 32: online: False, but recounted True"),
    "section gone": (
        lambda m: m.sections["flags"].__setitem__(1, 0),
        "section 1: has System RAM but does not exist",
    ),
    "section without memmap": (_section_without_memmap, "section 34: flags 0x1 without memmap"),
    "section's node": (
        lambda m: m.sections["nid"].__setitem__(34, 0),
        r"section 34: node 0, but its block lies on \(1,\)",
    ),
    "stray section": (_stray_section, "sections of block 20 exist without memory block"),
    "section above the highest": (
        lambda m: m.sections["flags"].__setitem__(100, 3),
        "a section above 35, the highest that was ever there",
    ),
    "highest section": (
        lambda m: setattr(m, "highest_present_section_nr", -1),
        "a section above -1, the highest that was ever there",
    ),
    "no subsections": (_no_subsections, "section 34: missing subsections: 184467440737095516"),
    "a subsection of boot": (
        lambda m: m.sections["subsection_map"].__setitem__(1, (1 << 64) - 2),
        "section 1: missing subsections: 1, but recounted 0",
    ),
    "memmap without users": (
        lambda m: _chunk(m, "vmemmap_users", 0),
        r"2 MiB pieces of memmap: \[\], but recounted \[32\]",
    ),
    "stray memmap": (
        lambda m: m.vmemmap_users.__setitem__(20, 1),
        r"2 MiB pieces of memmap: \[20\], but recounted \[\]",
    ),
    "memmap above the highest section's": (
        lambda m: m.vmemmap_users.__setitem__(77, 1),
        "memmap above that of the highest section that was ever there",
    ),
    "memmap not mapped": (
        lambda m: _chunk(m, "vmemmap_pfn", 0),
        r"mapped pieces of memmap: \[\], but recounted \[32\]",
    ),
    "memmap's table": (
        lambda m: m.vmemmap_tables[0].__setitem__(1, 3),
        r"memmap's page tables: \{0: 3\}",
    ),
    "memmap's page freed": (_drop_memmap, "memmap's page 0x[0-9a-f]+ is not in use"),
    # zones
    "present": (_set("present_pages", 512), "node 1 zone Normal: present: 33280, but"),
    "present beyond the span": (
        _set("spanned_pages", -1),
        "node 1 zone Normal: present exceeds spanned",
    ),
    "empty zone with a span": (_stale_span, "node 1 zone DMA32: has a span but no pages"),
    "span begins too early": (
        lambda m: _wide_span(m, 512),
        "node 1 zone Normal: the first page of its span is not in it",
    ),
    "span ends too late": (
        lambda m: _wide_span(m, 0),
        "node 1 zone Normal: the last page of its span is not in it",
    ),
    "managed too many": (_set("managed_pages", 1 << 20), "node 1 zone Normal: managed 10"),
    "managed fewer than free": (
        lambda m: setattr(normal(m), "managed_pages", 0),
        "node 1 zone Normal: managed: 0, but recounted 32768",
    ),
    "managed one short": (_set("managed_pages", -1), "node 1 zone Normal: managed: 32767, but"),
    "an allocated page's record": (_wipe_page, "node 1 zone Normal: managed: 32768, but recounted"),
    "an allocated block's record": (_wipe_block, "node 1 zone Normal: managed: 32768, but"),
    "present since boot": (
        _set("present_early_pages", 512),
        "node 1 zone Normal: present since boot: 512, but recounted 0",
    ),
    "reserve for atomic requests": (
        _set("nr_reserved_highatomic", 1),
        "node 1 zone Normal: nr_reserved_highatomic 1, but 0 pages",
    ),
    "isolated count": (_isolated, "node 1 zone Normal: isolated pageblocks: 1, but recounted 0"),
    "zone of a page": (_page_zone, "memory32: page 0x100000 is in another zone"),
    "watermarks": (_set("watermark_min", 1 << 30), "node 1 zone Normal: watermarks out of order"),
    "low watermark": (_set("watermark_low", 1), "node 1 zone Normal: high watermark: "),
    "all watermarks": (
        lambda m: [_set(f"watermark_{w}", 1)(m) for w in ("min", "low", "high")],
        "node 1 zone Normal: min, low and high: ",
    ),
    "lowmem_reserve": (_reserve_of, "node 0 zone DMA: lowmem_reserve: "),
    "stat_threshold": (_set("stat_threshold", 1), "node 1 zone Normal: stat_threshold: "),
    "no watermarks": (
        lambda m: [setattr(normal(m), f"watermark_{w}", 0) for w in ("min", "low", "high")],
        "node 1 zone Normal: no watermarks",
    ),
    # free lists and per-CPU lists
    "lost free block": (
        _lost_free_block,
        "node 1 zone Normal: free blocks of order 10, Movable: 31, but recounted 30",
    ),
    "list of a free block": (_wrong_free_type, "node 1 zone Normal: free blocks of order 10, Mov"),
    "free mask": (_free_mask, "node 1 zone Normal: orders of Movable with free blocks"),
    "free pages": (_set("nr_free_pages", 1), "node 1 zone Normal: free pages"),
    "block listed twice": (
        lambda m: _relink(normal(m), m, lambda pfns: pfns[0]),
        "free blocks of order 10, Movable: a block is listed twice",
    ),
    "misaligned block": (
        lambda m: _relink(normal(m), m, lambda pfns: pfns[-1] + 512),
        "free blocks of order 10, Movable: misaligned: pfn 0x[0-9a-f]+",
    ),
    "block outside the zone": (
        lambda m: _relink(normal(m), m, lambda pfns: 1 << 22),
        "free blocks of order 10, Movable: outside the zone: pfn 0x400000",
    ),
    "link backwards": (
        lambda m: m.pageblocks["prev"].__setitem__(normal(m).free_list(10, 1)[3] >> 9, 77),
        "free blocks of order 10, Movable: not linked back to the one before: pfn 0x",
    ),
    "link of a small block backwards": (
        lambda m: m.memmap["prev"].__setitem__(_two_small_ones(m), 77),
        "free blocks of order 0, Movable: not linked back to the one before: pfn 0x",
    ),
    "per-CPU count": (_pcp_count, "node 1 zone Normal: pages on per-CPU lists"),
    "per-CPU count of another CPU": (_pcp_moved, "node 1 zone Normal: pages on the lists of CPU 0"),
    "per-CPU sizes": (_pcp_size, "node 1 zone Normal: CPU 0 high and batch"),
    # memory blocks and groups
    "block id": (_block_id, "memory34: id: 44, but recounted 34"),
    "block state": (_block_state, "memory34: state going-offline"),
    "offline block in a zone": (_offline_block_in_zone, "memory34: offline but in a zone"),
    "block on an absent node": (_block_on_absent_node, "memory34: linked to an absent node"),
    "node of a block": (
        lambda m: setattr(m.memory_blocks[34], "nid", 0),
        "memory34: node: 0, but recounted 1",
    ),
    "own memmap": (
        lambda m: setattr(m.memory_blocks[34], "nr_vmemmap_pages", 512),
        "memory34: its memmap lies elsewhere",
    ),
    "own memmap's size": (
        lambda m: setattr(m.memory_blocks[34], "nr_vmemmap_pages", 7),
        "memory34: pages of its own memmap: 7, but recounted 512",
    ),
    "pages of an own memmap": (
        lambda m: m.pageblocks["state"].__setitem__(DIMM >> 21, 2),
        "memory32: pages set aside for its own memmap: 0, but recounted 512",
    ),
    "block without section": (_block_without_section, "memory90: 0 of its pages are System RAM"),
    "cpuset nodes": (_cpuset_nodes, r"nodes of cpuset group: \{0\}, but recounted \{1\}"),
    "group member": (_group_member, "memory32: its group does not list it"),
    "group count": (_group_count, "memory group 0: present"),
    "group id": (
        lambda m: setattr(m.memory_groups[0], "mgid", 3),
        "memory group 0: id: 3, but recounted 0",
    ),
    "absent group member": (
        lambda m: m.memory_groups[0].blocks.add(99),
        "memory group 0: lists memory99, which is not there",
    ),
    "foreign group member": (
        lambda m: m.memory_groups[0].blocks.add(1),
        "memory group 0: lists memory1, which is not in it",
    ),
    # firmware
    "empty slot": (
        lambda m: setattr(m.acpi_devices[0], "dimm", None),
        "DIMM a: is not in slot 0",
    ),
    "unknown DIMM": (lambda m: m.dimms.clear(), "PNP0C80:00: its DIMM a is not there"),
    "group of a device": (
        lambda m: setattr(m.acpi_devices[0], "mgid", 7),
        "PNP0C80:00: no memory group 7",
    ),
    "other group of a device": (_other_group, "memory32: its device's group: 1, but recounted 0"),
    "link from a device": (
        lambda m: setattr(m.memory_blocks[34], "firmware_node", None),
        "PNP0C80:00: linked with memory34, which is not with it",
    ),
    "link to a device": (
        lambda m: setattr(m.memory_blocks[1], "firmware_node", "PNP0C80:05"),
        "memory1: PNP0C80:05 is not linked with it",
    ),
    "firmware map": (
        lambda m: m.firmware_map.popitem(),
        "memory32: not in the firmware map",
    ),
    "firmware map's numbers": (
        lambda m: setattr(m, "firmware_map_next", 0),
        "firmware map: entry 0",
    ),
    # nodes
    "node present": (_node_present, "node 1: present: "),
    "node span": (_node_span, "node 1: start and span"),
    "node online": (lambda m: m.n_online.discard(1), r"online nodes: \{0\}, but"),
    "impossible node online": (lambda m: m.n_online.add(9), r"online nodes: \{0, 1, 9\}, but"),
    "node directory": (lambda m: m.node_devices.add(5), "nodes with a directory"),
    "has memory": (lambda m: m.n_memory.discard(1), "nodes with memory"),
    "has normal memory": (lambda m: m.n_normal_memory.discard(1), "nodes with normal memory"),
    "stray node with memory": (lambda m: m.n_normal_memory.add(7), "nodes with normal memory"),
    "kswapd": (lambda m: m.kthreads.discard("kswapd1"), "daemons: "),
    "stray kcompactd": (lambda m: m.kthreads.add("kcompactd7"), "daemons: "),
    "cpuset": (lambda m: m.top_cpuset_mems.discard(1), "top cpuset's nodes"),
    # zonelists and totals
    "zonelist": (
        lambda m: m.nodes[0].zonelist.pop(),
        "node 0: populated zones on the zonelist",
    ),
    "zone twice on a list": (
        lambda m: m.nodes[0].zonelist.append(m.nodes[0].zonelist[0]),
        "node 0: a zone is on its zonelist twice",
    ),
    "order of a zonelist": (
        lambda m: m.nodes[0].zonelist.reverse(),
        r"node 0: zonelist: \[7, 8, 0, 1\], but recounted \[1, 0, 8, 7\]",
    ),
    "fallback order": (
        lambda m: m.nodes[1].fallback_order.reverse(),
        r"node 1: fallback order: \[0, 1\], but recounted \[1, 0\]",
    ),
    "own zonelist": (lambda m: m.nodes[1].nofallback.pop(), "node 1: its own zonelist"),
    "total": (lambda m: setattr(m, "totalram_pages", 5), "totalram_pages: 5, but"),
    "reserve": (lambda m: setattr(m, "totalreserve_pages", 5), "totalreserve_pages: 5, but"),
    "no reserve": (lambda m: setattr(m, "totalreserve_pages", 0), "totalreserve_pages: 0, but"),
    "reserve of a node": (_reserve_of_node, "node 1: totalreserve_pages [0-9]+, not "),
    "poisoned pages": (
        lambda m: m.hwpoison.add(normal(m).zone_start_pfn),
        "poisoned pages: 0, but recounted 1",
    ),
    "HardwareCorrupted": (_uncounted, "num_poisoned_pages 0: too few"),
    "max_pfn": (lambda m: setattr(m, "max_pfn", 5), "max_pfn 0x5 is below the end of memory"),
    "max_pfn one short": (
        lambda m: setattr(m, "max_pfn", normal(m).zone_end_pfn + 32767),
        "max_pfn 0x10ffff is below the end of memory 0x110000",
    ),
    # what user space sees
    "sysfs blocks": (
        lambda m: _shown(m, "listdir", SYSFS + "memory", ["memory32"]),
        "sysfs memory blocks",
    ),
    "sysfs state": (
        lambda m: _shown(m, "read", SYSFS + "memory/memory33/state", "offline\n"),
        "memory33/state: offline, but recounted online",
    ),
    "sysfs nodes": (
        lambda m: _shown(m, "listdir", SYSFS + "node", ["node0"]),
        "sysfs nodes",
    ),
}


MODULES = (validate_module.__file__, zone_module.__file__)


@functools.cache
def caught(what: str) -> tuple[str, tuple[str, int]]:
    """Corrupt a machine; return validate()'s message and the line of the check that raised."""
    m = built()
    CORRUPTIONS[what][0](m)
    with pytest.raises(ValidationError) as failure:
        m.validate()
    frames = [
        f
        for f in traceback.extract_tb(failure.value.__traceback__)
        if f.filename in MODULES and f.name not in ("_equal", "_true", "_none")
    ]
    return str(failure.value), (frames[-1].filename, frames[-1].lineno or 0)


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_corruption_is_seen(what: str) -> None:
    message, _ = caught(what)
    assert re.search(f"(^|: ){CORRUPTIONS[what][1]}", message)


def test_each_check_catches_a_corruption() -> None:
    sites = [
        (module, node.lineno, node.end_lineno or 0)
        for module in MODULES
        for node in ast.walk(ast.parse(Path(module).read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("_equal", "_true", "_none", "check_tree")
    ]
    places = {caught(what)[1] for what in CORRUPTIONS}
    silent = [
        (Path(module).name, first)
        for module, first, last in sites
        if not any(m == module and first <= n <= last for m, n in places)
    ]
    assert len(sites) > 65
    assert not silent, f"no corruption is caught by the checks at lines {silent}"
