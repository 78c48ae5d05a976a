"""The layers that a person reads at the end of a run."""

from __future__ import annotations

import pytest

from kmm import Machine, views
from kmm import memory_hotplug as mh
from kmm.errors import OutOfMemory
from tests.conftest import DIMM, two_nodes

BLOCK = 128 << 20


def layer(m: Machine, title: str) -> list[str]:
    return next(lines for name, lines in views.layers(m) if name.startswith(title))


def test_the_memmap_of_a_block_lies_where_it_was_taken(m: Machine) -> None:
    mh.add_memory(m, 1, DIMM, BLOCK)
    assert "memmap taken at boot: 0-7" in layer(m, "sections")
    assert "memmap in node 0 DMA32: 32" in layer(m, "sections")
    m.validate()


def test_a_memmap_in_its_own_block_says_so() -> None:
    m = two_nodes("memory_hotplug.memmap_on_memory=1")
    m.plug("a", 1, DIMM, BLOCK)
    assert "memmap in the block itself: 32" in layer(m, "sections")
    m.validate()


def test_a_memmap_of_single_pages_says_so(m: Machine) -> None:
    pfns = m.alloc_pages_bulk(1 << 20, 0).tolist()
    with pytest.raises(OutOfMemory):
        while True:
            pfns.append(m.alloc_pages())
    for zone in m.nodes[0].zones[:2]:
        while zone.rmqueue(9, 1) >= 0:
            pass
        zone.drain()
        while zone.rmqueue(9, 1) >= 0:
            pass
    m.free_pages_bulk(sorted(pfns)[::2])
    mh.add_memory(m, 1, DIMM, BLOCK)
    assert "memmap in node 0 DMA32, page by page: 32" in layer(m, "sections")
    m.validate()


def test_the_resource_layer_shows_ram_and_what_lies_in_it(m: Machine) -> None:
    mh.add_memory(m, 1, DIMM, BLOCK)
    lines = layer(m, "resource tree")
    assert "100000000-107ffffff : System RAM" in lines
    assert "  01000000-01e01d31 : Kernel code" in lines
    assert not any("PCI" in line for line in lines)
    assert lines[-1].endswith("see /proc/iomem")
    m.validate()


def marks(text: str, mark: str) -> list[str]:
    return [line[4:] for line in text.splitlines() if line.startswith(f"  {mark} ")]


def test_what_is_gone_is_marked_where_it_stood(m: Machine) -> None:
    mh.add_memory(m, 1, DIMM, 2 * BLOCK)
    m.write("/sys/devices/system/memory/memory32/state", "online_movable")
    before = views.layers(m)
    m.write("/sys/devices/system/memory/memory32/state", "offline")
    mh.remove_memory(m, DIMM, 2 * BLOCK)
    text = views.show(views.layers(m), before)
    gone = marks(text, "-")
    assert gone[0] == "100000000-10fffffff : System RAM"
    assert [line.partition(":")[0] for line in gone[1:]] == [
        "memmap in node 0 DMA32",
        "node 1 Movable",
        "node 1 Movable",
        "memory32",
        "memory33",
    ]
    lines = text.splitlines()
    assert lines[lines.index(f"  - {gone[0]}") + 1].endswith("see /proc/iomem")
    assert (
        "node 0: online, start_pfn 1, spanned 262111, present 262014, fallback order 0"
        in " ".join(marks(text, "*") + marks(text, " "))
    )
    m.validate()


def test_a_layer_that_lost_its_only_line() -> None:
    text = views.show([("a", [])], [("a", ["one: 1"])])
    assert text == "a\n  - one: 1"
    assert views.show([("a", [])], [("a", [])]) == "a\n    none"
    assert views.show([("a", ["one: 2"])], [("a", ["one: 1"])]) == "a\n  * one: 2"


def test_changes_are_marked(m: Machine) -> None:
    before = views.layers(m)
    mh.add_memory(m, 1, DIMM, BLOCK)
    text = views.show(views.layers(m), before)
    assert "  * 100000000-107ffffff : System RAM" in text
    assert "    00001000-0009fbff : System RAM" in text
    m.validate()
