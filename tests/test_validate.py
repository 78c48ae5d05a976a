"""validate() sees a machine that was tampered with, whatever was changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kmm import Machine, ValidationError
from kmm.memory_block import MemoryBlock
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


CORRUPTIONS: dict[str, tuple[Callable[[Machine], None], str]] = {
    "present": (_set("present_pages", 512), "present"),
    "span": (_set("spanned_pages", -1024), "present|span|start"),
    "managed too many": (_set("managed_pages", 1 << 20), "managed"),
    "managed off by one": (_set("managed_pages", -1), "free pages|totalram|managed"),
    "free pages": (_set("nr_free_pages", 1), "free pages"),
    "watermarks": (_set("watermark_min", 1 << 30), "watermarks out of order"),
    "isolated count": (_isolated, "isolated pageblocks"),
    "lost free block": (_lost_free_block, "free blocks of order 10"),
    "list of a free block": (_wrong_free_type, "free blocks of order 10"),
    "zone of a page": (_page_zone, "zone"),
    "per-CPU sizes": (_pcp_size, "high and batch"),
    "resource overlap": (_resource_overlap, "overlaps"),
    "resource shrunk": (_resource_gone, "System RAM"),
    "resource without block": (_resource_without_block, "no memory36"),
    "section offline": (_section_offline, "section 32: online"),
    "section without memmap": (_section_without_memmap, "without memmap"),
    "stray section": (_stray_section, "without memory block"),
    "no subsections": (_no_subsections, "no subsection"),
    "block state": (_block_state, "state going-offline"),
    "block id": (_block_id, "memory44"),
    "offline block in a zone": (_offline_block_in_zone, "offline but in a zone"),
    "block on an absent node": (_block_on_absent_node, "absent node"),
    "block without section": (_block_without_section, "memory90"),
    "group count": (_group_count, "memory group 0"),
    "group member": (_group_member, "does not list it"),
    "node present": (_node_present, "node 1: present"),
    "node span": (_node_span, "node 1: start and span"),
    "node online": (lambda m: m.n_online.discard(1), "node 1: online|zonelist"),
    "node directory": (lambda m: m.node_devices.discard(1), "absent node|directory"),
    "has memory": (lambda m: m.n_memory.discard(1), "has memory"),
    "has normal memory": (lambda m: m.n_normal_memory.discard(1), "has normal memory"),
    "kswapd": (lambda m: m.kthreads.discard("kswapd1"), "kswapd1"),
    "kcompactd": (
        lambda m: m.kthreads.add("kcompactd7") or m.kthreads.discard("kcompactd1"),
        "kcompactd1",
    ),
    "zonelist": (lambda m: m.nodes[0].zonelist.pop(), "zonelist"),
    "zone twice on a list": (lambda m: m.nodes[0].zonelist.append(m.nodes[0].zonelist[0]), "twice"),
    "own zonelist": (lambda m: m.nodes[1].nofallback.pop(), "own zonelist"),
    "cpuset": (lambda m: m.top_cpuset_mems.add(1) or m.top_cpuset_mems.discard(0), "cpuset"),
    "total": (lambda m: setattr(m, "totalram_pages", 5), "totalram_pages"),
    "reserve": (lambda m: setattr(m, "totalreserve_pages", 5), "totalreserve_pages"),
    "max_pfn": (lambda m: setattr(m, "max_pfn", 5), "max_pfn"),
}


@pytest.mark.parametrize("what", sorted(CORRUPTIONS))
def test_corruption_is_seen(what: str) -> None:
    m = built()
    change, message = CORRUPTIONS[what]
    change(m)
    with pytest.raises(ValidationError, match=message):
        m.validate()


def test_sysfs_that_disagrees_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    m = built()
    monkeypatch.setattr(m, "listdir", lambda path: ["memory32"])
    with pytest.raises(ValidationError, match="sysfs memory blocks"):
        m.validate()
