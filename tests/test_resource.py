"""The resource tree against a plain set of addresses, and its text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmm import ConfigError, KernelError
from kmm import resource as r
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
