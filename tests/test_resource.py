"""The resource tree against a plain set of addresses, and its text."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmm import ConfigError, KernelError
from kmm import resource as r
from kmm.errors import AlreadyExists, ImpossibleState, ValidationError
from tests.conftest import recording

BUSY = r.IORESOURCE_SYSTEM_RAM | r.IORESOURCE_BUSY


@pytest.mark.parametrize("name", ["movable_node", "four_nodes", "probe", "random_3_gib"])
def test_every_recorded_text_round_trips(name: str) -> None:
    for step in recording(name)["steps"]:
        text = step.get("files", {}).get("/proc/iomem")
        if text:
            tree = r.parse_iomem(text)
            r.check_tree(tree)
            assert r.iomem_show(tree) == text + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "line 1: 'nonsense'; allowed"),
        ("00001000-00001fff : a\n    00001000-000010ff : b", "line 2"),
        ("00001000-00001fff : a\n00001800-00002fff : b", "line 2: .* overlaps"),
        ("00000000-00000000 : a\n00000000-00000000 : b", "without privilege"),
    ],
)
def test_bad_texts_are_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        r.parse_iomem(text)


def test_a_region_descends_into_parents_that_are_not_busy() -> None:
    tree = r.parse_iomem("40000000-afffffff : PCI Bus 0000:00\nb0000000-bfffffff : IOAPIC 0\n")
    new = r.__request_region(tree, 0x50000000, 0x8000000, "System RAM", BUSY)
    assert new.parent is not None and new.parent.name == "PCI Bus 0000:00"
    for start in (0x50000000, 0xB0000000, 0xAC000000):
        with pytest.raises(KernelError) as e:
            r.__request_region(tree, start, 0x8000000, "System RAM", BUSY)
        assert e.value.errno == 17
    r.release_mem_region_adjustable(tree, 0x50000000, 0x8000000)
    assert not new.parent.children if new.parent else True
    r.check_tree(tree)


def test_insert_nests_around_and_inside() -> None:
    tree = r.ResourceTree()
    r.insert_resource(tree.root, r.Resource(0x1000, 0x1FFF, "inner"))
    r.insert_resource(tree.root, r.Resource(0x0, 0xFFFF, "outer"))
    r.insert_resource(tree.root, r.Resource(0x1100, 0x11FF, "innermost"))
    assert [(d, x.name) for d, x in tree.walk()] == [
        (0, "outer"),
        (1, "inner"),
        (2, "innermost"),
    ]
    with pytest.raises(KernelError):
        r.insert_resource(tree.root, r.Resource(0x1800, 0x2FFF, "across"))
    r.check_tree(tree)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.integers(1, 6)), max_size=40))
def test_random_adds_and_removes(steps: list[tuple[bool, int, int]]) -> None:
    tree = r.ResourceTree()
    owned: dict[int, int] = {}  # unit -> which add it belongs to
    for number, (adding, start, size) in enumerate(steps):
        units = range(start, start + size)
        if adding:
            try:
                r.__request_region(tree, start << 12, size << 12, "System RAM", BUSY)
                assert not any(u in owned for u in units)
                owned.update(dict.fromkeys(units, number))
            except KernelError:
                assert any(u in owned for u in units)
        else:
            r.release_mem_region_adjustable(tree, start << 12, size << 12)
            if len({owned.get(u) for u in units}) == 1 and start in owned:
                part = owned[start]
                for u in units:
                    del owned[u]
                # What was behind the hole is a resource of its own now.
                for u in range(start + size, 64):
                    if owned.get(u) != part:
                        break
                    owned[u] = 1000 + number
        r.check_tree(tree)
        covered = r.walk_system_ram_range(tree, 0, 64)
        assert {p + i for p, n in covered for i in range(n)} == set(owned)


# -- rule by rule -----------------------------------------------------------------------

RAM = """\
00000000-00000fff : Reserved
00001000-0009fbff : System RAM
000a0000-000bffff : PCI Bus 0000:00
000f0000-000fffff : System ROM
00100000-3fffffff : System RAM
  01000000-01ffffff : Kernel code
40000000-afffffff : PCI Bus 0000:00
  40000000-40000fff : 0000:00:1f.2
fec00000-fec003ff : IOAPIC 0
fed1c000-fed1ffff : Reserved
100000000-11fffffff : System RAM
"""

KMEM = """\
140000000-1bfffffff : Persistent Memory
  140000000-14fffffff : namespace0.0
  150000000-1bfffffff : dax0.0
    150000000-1bfffffff : System RAM (kmem)
"""


def flags_at(tree: r.ResourceTree, name: str) -> list[int]:
    return [x.flags for _, x in tree.walk() if x.name == name]


@pytest.mark.parametrize("text", [RAM, KMEM, RAM + KMEM, ""])
def test_a_text_comes_back_as_it_was(text: str) -> None:
    tree = r.parse_iomem(text)
    r.check_tree(tree)
    assert r.iomem_show(tree) == text


@pytest.mark.parametrize(
    ("name", "start", "flags"),
    [
        ("System RAM", 0x100000, BUSY),
        ("System RAM (kmem)", 1 << 32, BUSY | r.IORESOURCE_SYSRAM_DRIVER_MANAGED),
        *((f"Kernel {part}", 1 << 24, BUSY) for part in ("code", "rodata", "data", "bss")),
        ("Reserved", 0, r.IORESOURCE_MEM | r.IORESOURCE_BUSY),
        ("Reserved", 0x100000, r.IORESOURCE_MEM),
        *(
            (name, 1 << 30, r.IORESOURCE_MEM | r.IORESOURCE_BUSY)
            for name in (
                "ACPI Tables",
                "ACPI Non-volatile Storage",
                "Unusable memory",
                "PCI MMCONFIG 0000 [bus 00-ff]",
                "IOAPIC 0",
                "Local APIC",
                "Video ROM",
                "System ROM",
                "Adapter ROM",
            )
        ),
        *(
            (name, 1 << 30, r.IORESOURCE_MEM)
            for name in (
                "PCI Bus 0000:00",
                "pnp 00:05",
                "HPET 0",
                "PNP0103:00",
                "0000:00:1f.2",
                "Persistent Memory",
                "Soft Reserved",
                "what nobody knows",
            )
        ),
    ],
)
def test_flags_follow_from_the_name(name: str, start: int, flags: int) -> None:
    tree = r.parse_iomem(f"{start:08x}-{start + 0xFFF:08x} : {name}\n")
    assert flags_at(tree, name) == [flags]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # Blank lines are skipped and still counted.
        ("00000000-00000fff : a\n\nbad\n", "line 3: 'bad'; allowed"),
        ("00002000-00000fff : a\n", "line 1: .* ends before it starts"),
        ("00000000-00000fff : a\n  00000800-00001fff : b\n", "line 2: .* is not inside a"),
        ("00000000-1ffffffffffffffff : a\n", "line 1: .* is not inside PCI mem"),
        ("00000000-00000fff : a\n 00000000-000000ff : b\n", "line 2"),
    ],
)
def test_bad_lines_are_named_with_their_fault(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        r.parse_iomem(text)


def test_the_indent_ends_at_five_but_no_resource_is_left_out() -> None:
    tree = r.ResourceTree()
    for i in range(8):
        r.insert_resource(tree.root, r.Resource(i << 12, ((64 - i) << 12) - 1, f"l{i}"))
    text = r.iomem_show(tree)
    assert [len(s) - len(s.lstrip()) for s in text.splitlines()] == [0, 2, 4, 6, 8, 10, 10, 10]
    assert r.dump(r.parse_iomem(text)) == r.dump(tree)


def test_request_resource_neither_overlaps_nor_sticks_out() -> None:
    tree = r.ResourceTree()
    parent = r.Resource(0x1000, 0x4FFF, "parent")
    r.request_resource(tree.root, parent)
    r.request_resource(parent, r.Resource(0x2000, 0x2FFF, "child"))
    for start, end in [(0x2800, 0x37FF), (0x0, 0x1FFF), (0x4000, 0x5FFF), (0x3001, 0x3000)]:
        with pytest.raises(KernelError) as e:
            r.request_resource(parent, r.Resource(start, end, "x"))
        assert e.value.errno == 16
    r.check_tree(tree)


def test_a_region_is_busy_and_inherits_type_and_desc() -> None:
    tree = r.ResourceTree()
    flags = r.IORESOURCE_SYSTEM_RAM | r.IORESOURCE_EXCLUSIVE
    r.request_resource(tree.root, r.Resource(0x10000, 0x1FFFF, "virtio0", flags, desc=7))
    new = r.__request_region(tree, 0x10000, 0x1000, "x", 0, 3)
    assert (new.flags, new.desc) == (BUSY, 7)  # and not EXCLUSIVE


def test_an_inserted_parent_takes_only_what_it_contains() -> None:
    tree = r.ResourceTree()
    for i in range(6):
        r.insert_resource(tree.root, r.Resource(i << 12, (i << 12) + 0xFFF, f"p{i}"))
    new = r.Resource(2 << 12, (5 << 12) - 1, "around")
    r.insert_resource(tree.root, new)
    assert [c.name for c in tree.root.children] == ["p0", "p1", "around", "p5"]
    assert [c.name for c in new.children] == ["p2", "p3", "p4"]
    r.check_tree(tree)


@pytest.mark.parametrize(
    ("start", "end", "left"),
    [
        (0x100, 0x1FF, []),
        (0x100, 0x13F, [(0x140, 0x1FF)]),
        (0x1C0, 0x1FF, [(0x100, 0x1BF)]),
        (0x140, 0x17F, [(0x100, 0x13F), (0x180, 0x1FF)]),
        # Expect nothing where no busy resource holds the whole range.
        (0x80, 0x17F, [(0x100, 0x1FF)]),
        (0x180, 0x27F, [(0x100, 0x1FF)]),
        (0x400, 0x4FF, [(0x100, 0x1FF)]),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_release_deletes_trims_or_splits(
    start: int, end: int, left: list[tuple[int, int]], nested: bool
) -> None:
    tree = r.ResourceTree()
    if nested:
        r.request_resource(tree.root, r.Resource(0x0, 0xFFF, "dax0.0"))
    old = r.__request_region(tree, 0x100, 0x100, "System RAM", BUSY)
    assert old.parent is not None
    parent = old.parent
    r.release_mem_region_adjustable(tree, start, end - start + 1)
    assert [(c.start, c.end) for c in parent.children] == left
    assert all((c.name, c.flags, c.desc) == (old.name, old.flags, 0) for c in parent.children)
    assert not left or parent.children[0] is old
    r.check_tree(tree)


#   0x100              0x180  0x1a0       0x1ff
#     |------ System RAM --|child|----------|
@pytest.mark.parametrize(
    ("start", "end", "left"),
    [
        # Expect the child to stay where it is, in the lower part.
        (0x1C0, 0x1DF, [(0x100, 0x1BF), (0x1E0, 0x1FF)]),
        (0x1A0, 0x1FF, [(0x100, 0x19F)]),
        (0x100, 0x17F, [(0x180, 0x1FF)]),
        # Expect a refusal: the child would be in the upper part, or in none.
        (0x120, 0x13F, [(0x100, 0x1FF)]),
        (0x180, 0x18F, [(0x100, 0x1FF)]),
        (0x190, 0x1FF, [(0x100, 0x1FF)]),
        (0x100, 0x18F, [(0x100, 0x1FF)]),
    ],
)
def test_release_never_leaves_a_child_outside(
    start: int, end: int, left: list[tuple[int, int]]
) -> None:
    tree = r.ResourceTree()
    old = r.__request_region(tree, 0x100, 0x100, "System RAM", BUSY)
    r.request_resource(old, r.Resource(0x180, 0x19F, "Crash kernel", BUSY))
    r.release_mem_region_adjustable(tree, start, end - start + 1)
    assert [(c.start, c.end) for c in tree.root.children] == left
    assert [c.name for c in old.children] == ["Crash kernel"]
    r.check_tree(tree)


def test_release_resource_takes_what_is_under_it() -> None:
    tree = r.parse_iomem(RAM)
    ram = next(x for _, x in tree.walk() if x.start == 0x100000)
    r.release_resource(ram)
    assert ram.parent is None and "Kernel code" not in r.iomem_show(tree)
    r.release_resource(ram)  # a second time does nothing
    r.check_tree(tree)


def test_merging_needs_the_mark_on_both_and_no_children() -> None:
    tree = r.ResourceTree()
    parts = [r.__request_region(tree, i * 0x100, 0x100, "System RAM", BUSY) for i in range(5)]
    r.request_resource(parts[4], r.Resource(0x400, 0x40F, "Kernel code", BUSY))
    for i in (0, 2, 4):
        r.merge_system_ram_resource(tree, parts[i])
    assert len(tree.root.children) == 5  # an unmarked one lies between each two
    r.merge_system_ram_resource(tree, parts[1])
    assert [(c.start, c.end) for c in tree.root.children] == [
        (0x0, 0x2FF),
        (0x300, 0x3FF),
        (0x400, 0x4FF),
    ]
    r.merge_system_ram_resource(tree, parts[3])
    assert [(c.start, c.end) for c in tree.root.children] == [(0x0, 0x3FF), (0x400, 0x4FF)]
    r.check_tree(tree)


def test_merging_leaves_other_names_and_other_kinds_alone() -> None:
    tree = r.ResourceTree()
    a = r.__request_region(tree, 0x0, 0x100, "System RAM (a)", BUSY)
    b = r.__request_region(tree, 0x100, 0x100, "System RAM (b)", BUSY)
    rom = r.__request_region(tree, 0x200, 0x100, "System ROM", r.IORESOURCE_MEM)
    for res in (a, b, rom):
        r.merge_system_ram_resource(tree, res)
    assert len(tree.root.children) == 3
    assert not rom.flags & r.IORESOURCE_SYSRAM_MERGEABLE


def test_walk_finds_whole_pages_in_address_order() -> None:
    tree = r.parse_iomem(RAM + KMEM)
    assert r.walk_system_ram_range(tree, 0, 1 << 36) == [
        (1, 0x9E),  # 0x9fbff ends within a page
        (0x100, 0x3FF00),
        (0x100000, 0x20000),
        (0x150000, 0x70000),  # under two parents that are not busy
    ]
    assert r.walk_system_ram_range(tree, 0x3FFF0, 0x20) == [(0x3FFF0, 0x10)]
    assert r.walk_system_ram_range(tree, 0x40000, 0x1000) == []


def test_trees_copy_deeply_and_compare_by_dump() -> None:
    tree = r.parse_iomem(RAM + KMEM)
    twin = copy.deepcopy(tree)
    r.check_tree(twin)
    assert r.dump(twin) == r.dump(tree)
    r.release_mem_region_adjustable(twin, 1 << 32, 1 << 27)
    assert r.dump(twin) != r.dump(tree)
    assert r.iomem_show(tree) == RAM + KMEM
    # A node's repr is its own line, not the tree.
    assert "System" not in repr(tree.root)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda t: t.root.children.reverse(), "overlaps the one before"),
        (lambda t: setattr(t.root.children[1], "start", 0x800), "overlaps the one before"),
        (lambda t: setattr(t.root.children[4].children[0], "end", 1 << 31), "not inside"),
        (lambda t: setattr(t.root.children[0], "end", -1), "not inside"),
        (lambda t: setattr(t.root.children[4].children[0], "parent", t.root), "its parent"),
    ],
)
def test_check_tree_names_the_first_fault(
    break_it: Callable[[r.ResourceTree], None], message: str
) -> None:
    tree = r.parse_iomem(RAM)
    r.check_tree(tree)
    break_it(tree)
    with pytest.raises(ValidationError, match=message):
        r.check_tree(tree)


def test_a_resource_that_its_parent_does_not_list_stops_at_once() -> None:
    tree = r.parse_iomem(RAM)
    with pytest.raises(ImpossibleState, match="release_resource"):
        r.release_resource(r.Resource(0x5000, 0x5FFF, "stray", parent=tree.root))


# The twin: windows 0-15, 16-31 and 32-47 of the address line, the middle one a parent that is
# not busy. A part is (first unit, last unit, where it lives); a pin is a child that never moves.
WINDOW = range(16, 32)


class Twin:
    def __init__(self) -> None:
        self.parts: list[tuple[int, int]] = []
        self.pins: list[tuple[int, int]] = []

    def fits(self, first: int, last: int) -> bool:
        inside = [u in WINDOW for u in range(first, last + 1)]
        return all(inside) or not any(inside)

    def request(self, first: int, last: int) -> bool:
        taken = any(a <= last and first <= b for a, b in self.parts)
        if taken or not self.fits(first, last):
            return False
        self.parts.append((first, last))
        return True

    def pin(self, first: int, last: int) -> bool:
        held = any(a <= first and last <= b for a, b in self.parts)
        if not held or any(a <= last and first <= b for a, b in self.pins):
            return False
        self.pins.append((first, last))
        return True

    def release(self, first: int, last: int) -> None:
        for a, b in self.parts:
            if not (a <= first and last <= b):
                continue
            pins = [p for p in self.pins if a <= p[0] and p[1] <= b]
            if (a, b) == (first, last):
                self.parts.remove((a, b))
                self.pins = [p for p in self.pins if p not in pins]
                return
            rest = [(x, y) for x, y in ((a, first - 1), (last + 1, b)) if x <= y]
            if all(rest[0][0] <= p[0] and p[1] <= rest[0][1] for p in pins):
                self.parts.remove((a, b))
                self.parts += rest
            return


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["request", "pin", "release"]), st.integers(0, 47), st.integers(0, 11)
        ),
        max_size=60,
    )
)
def test_random_lives_agree_with_the_twin(steps: list[tuple[str, int, int]]) -> None:
    tree, twin = r.ResourceTree(), Twin()
    window = r.Resource(WINDOW[0] << 12, (WINDOW[-1] << 12) + 0xFFF, "dax0.0")
    r.request_resource(tree.root, window)
    for what, first, more in steps:
        last = first + more
        start, size = first << 12, (more + 1) << 12
        if what == "release":
            twin.release(first, last)
            r.release_mem_region_adjustable(tree, start, size)
        elif what == "request":
            ok = twin.request(first, last)
            if ok:
                r.__request_region(tree, start, size, "System RAM", BUSY)
            else:
                with pytest.raises(AlreadyExists):
                    r.__request_region(tree, start, size, "System RAM", BUSY)
        elif twin.pin(first, last):
            holders = [x for _, x in tree.walk() if x.name == "System RAM"]
            holder = next(x for x in holders if x.contains(start, start + size - 1))
            r.request_resource(holder, r.Resource(start, start + size - 1, "pin", BUSY))
        r.check_tree(tree)
        units: dict[str, list[tuple[int, int]]] = {"System RAM": [], "pin": [], "dax0.0": []}
        for _, x in tree.walk():
            units[x.name].append((x.start >> 12, x.end >> 12))
        assert units["System RAM"] == sorted(twin.parts)
        assert units["pin"] == sorted(twin.pins)


def test_thousands_of_siblings_stay_cheap() -> None:
    tree = r.ResourceTree()
    for i in range(4096):
        r.__request_region(tree, i * 0x1000, 0x1000, "System RAM", BUSY)
    for i in range(0, 4096, 2):
        r.release_mem_region_adjustable(tree, i * 0x1000, 0x1000)
    assert len(tree.root.children) == 2048
    r.check_tree(tree)
