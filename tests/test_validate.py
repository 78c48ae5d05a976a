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
from kmm import Machine, ValidationError
from kmm.memory_block import MemoryBlock
from kmm.mmzone import Zone
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
    m.sections["flags"][100] = 3


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
    "stray section": (_stray_section, "sections of block 100 exist without memory block"),
    "no subsections": (_no_subsections, "section 34: no subsection"),
    "memmap without users": (
        lambda m: _chunk(m, "vmemmap_users", 0),
        r"2 MiB pieces of memmap: \[\], but recounted \[32\]",
    ),
    "stray memmap": (
        lambda m: m.vmemmap_users.__setitem__(77, 1),
        r"2 MiB pieces of memmap: \[77\], but recounted \[\]",
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
        "node 1 zone Normal: more free pages than managed ones",
    ),
    "isolated count": (_isolated, "node 1 zone Normal: isolated pageblocks: 1, but recounted 0"),
    "zone of a page": (_page_zone, "memory32: page 0x100000 is in another zone"),
    "watermarks": (_set("watermark_min", 1 << 30), "node 1 zone Normal: watermarks out of order"),
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
        "free blocks of order 10, Movable: pfn 0x[0-9a-f]+ is misaligned",
    ),
    "block outside the zone": (
        lambda m: _relink(normal(m), m, lambda pfns: 1 << 22),
        "free blocks of order 10, Movable: pfn 0x400000 lies outside the zone",
    ),
    "per-CPU count": (_pcp_count, "node 1 zone Normal: pages on per-CPU lists"),
    "per-CPU count of another CPU": (_pcp_moved, "node 1 zone Normal: pages on the lists of CPU 0"),
    "per-CPU sizes": (_pcp_size, "node 1 zone Normal: CPU 0 high and batch"),
    # memory blocks and groups
    "block id": (_block_id, "memory34: id: 44, but recounted 34"),
    "block state": (_block_state, "memory34: state going-offline"),
    "offline block in a zone": (_offline_block_in_zone, "memory34: offline but in a zone"),
    "block on an absent node": (_block_on_absent_node, "memory34: linked to an absent node"),
    "block without section": (_block_without_section, "memory90: 0 of its pages are System RAM"),
    "group member": (_group_member, "memory32: its group does not list it"),
    "group count": (_group_count, "memory group 0: present"),
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
    "own zonelist": (lambda m: m.nodes[1].nofallback.pop(), "node 1: its own zonelist"),
    "total": (lambda m: setattr(m, "totalram_pages", 5), "totalram_pages: 5, but"),
    "reserve": (lambda m: setattr(m, "totalreserve_pages", 5), "totalreserve_pages: 5, but"),
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


@functools.cache
def caught(what: str) -> tuple[str, int]:
    """Corrupt a machine; return validate()'s message and the line of the check that raised."""
    m = built()
    CORRUPTIONS[what][0](m)
    with pytest.raises(ValidationError) as failure:
        m.validate()
    frames = [
        f
        for f in traceback.extract_tb(failure.value.__traceback__)
        if f.filename == validate_module.__file__ and f.name not in ("_equal", "_true")
    ]
    return str(failure.value), frames[-1].lineno or 0


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_corruption_is_seen(what: str) -> None:
    message, _ = caught(what)
    assert re.search(f"(^|: ){CORRUPTIONS[what][1]}", message)


def test_each_check_catches_a_corruption() -> None:
    tree = ast.parse(Path(validate_module.__file__).read_text())
    sites = [
        (node.lineno, node.end_lineno or 0)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("_equal", "_true", "check_tree")
    ]
    lines = {caught(what)[1] for what in CORRUPTIONS}
    silent = [first for first, last in sites if not any(first <= n <= last for n in lines)]
    assert len(sites) > 40
    assert not silent, f"no corruption is caught by the checks at lines {silent}"
