"""validate() sees users, pages in use, LRU lists and counters that were tampered with."""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Callable

import numpy as np
import pytest

import kmm.validate_users as users_module
from kmm import Machine, ValidationError, _page_ref
from kmm.memory import User
from kmm.mempolicy import new_policy
from kmm.params import (
    PG_ACTIVE,
    PG_DIRTY,
    PG_ISOLATED,
    PG_LRU,
    PG_MLOCKED,
    PG_USER,
    PG_WRITEBACK,
    SLOT_HUGE,
    SLOT_PRESENT,
    SLOT_SWAPPED,
)
from kmm.vmstat import NODE_STAT_ITEMS, ZONE_STAT_ITEMS
from tests.conftest import DIMM, two_nodes
from tests.tampering import checks_of, line_that_raised, overwrite, writable


def built() -> Machine:
    """A machine with users of all sorts on its second node."""
    m = two_nodes("memhp_default_state=online_movable")
    m.plug("a", 1, DIMM, 256 << 20)
    bound = new_policy(m, "bind", [1])
    anon = User(m, "anon", "anon", 100, policy=bound, tokens=True)
    anon.engine.sow(7)
    anon.grow(100)
    User(m, "huge", "anon", 1100, policy=bound, thp="always").grow(1100)
    locked = User(m, "locked", "anon", 10, policy=bound)
    locked.engine.locked = True
    locked.grow(10)
    User(m, "tmpfs", "shmem", 50, policy=bound).grow(50)
    library = User(m, "library", "file", 30, policy=bound)
    library.engine.mapped = True
    library.fault(0, 10)
    library.fault(10, 10, PG_DIRTY)
    library.fault(20, 10, PG_WRITEBACK | PG_ACTIVE)
    for kind in ("slab", "slab_reclaimable", "stack", "page_table"):
        User(m, kind, kind, 7, order=2).grow(7)
    User(m, "large", "slab", 2, order=10).grow(2)
    User(m, "none", "file", 0)
    m.validate()
    return m


def page(m: Machine, name: str, index: int = 5) -> int:
    """Where a user's page is."""
    return int(m.users[name].pfns(index, 1)[0])


def flags(name: str, xor: int, index: int = 5) -> Callable[[Machine], None]:
    def change(m: Machine) -> None:
        m.memmap["flags"][page(m, name, index)] ^= np.uint16(xor)

    return change


def token(name: str, index: int = 5) -> Callable[[Machine], None]:
    def change(m: Machine) -> None:
        m.records.page_tokens[page(m, name, index)] = 1

    return change


def block(name: str, field: str, value: int) -> Callable[[Machine], None]:
    def change(m: Machine) -> None:
        m.pageblocks[field][page(m, name, 0) >> 9] = value

    return change


def slot(name: str, change: Callable[[int], int], index: int = 5) -> Callable[[Machine], None]:
    def do(m: Machine) -> None:
        slots = writable(m.users[name].engine.slots)
        slots[index] = change(int(slots[index]))

    return do


def swap_slots(m: Machine) -> None:
    slots = writable(m.users["anon"].engine.slots)
    slots[[3, 4]] = slots[[4, 3]]


def same_page_twice(m: Machine) -> None:
    slots = writable(m.users["anon"].engine.slots)
    slots[3] = slots[4]


def foreign_page(m: Machine) -> None:
    """A slot holds a page that the allocator gave to nobody known."""
    slots = writable(m.users["anon"].engine.slots)
    slots[3] = SLOT_PRESENT | m.alloc_pages(nid=1)


def lost_page(m: Machine) -> None:
    """A user's count and table agree, and one of its pages is not in them."""
    m.users["anon"].release(99, 1)
    pfn = m.alloc_pages(nid=1, gfp=0x100CCA)
    m.memmap[pfn] = m.memmap[page(m, "anon")]
    m.page_states[pfn] |= 0x10


def ended_user(m: Machine) -> None:
    m.users["none"].engine.close()


def mapped_once_more(m: Machine) -> None:
    _page_ref.count_node_stat(m.memmap_engine, 1, NODE_STAT_ITEMS.index("nr_mapped"), 1)


def zone_item(item: str) -> Callable[[Machine], None]:
    """A zone counts one page more."""

    def change(m: Machine) -> None:
        zone = m.nodes[1].zone(3)
        stat = list(zone.stat())
        before = struct.pack(f"{len(stat)}q", *stat)
        stat[ZONE_STAT_ITEMS.index(item)] += 1
        overwrite(zone, 0, before, struct.pack(f"{len(stat)}q", *stat))

    return change


def tag(m: Machine) -> None:
    m.memmap["prev"][page(m, "anon")] ^= 1 << 20


def huge_tag(m: Machine) -> None:
    m.pageblocks["prev"][page(m, "huge", 0) >> 9] ^= 1 << 20


U = "user '"
CORRUPTIONS: dict[str, tuple[Callable[[Machine], object], str]] = {
    "user without a number": (lambda m: m.users_by_number.popitem(), "users: "),
    "user without a name": (lambda m: m.users.popitem(), "users: "),
    "user who has ended": (ended_user, "users: "),
    "present and swapped": (
        slot("anon", lambda s: s | SLOT_SWAPPED),
        f"{U}anon': slot 5: has no one place",
    ),
    "neither": (slot("anon", lambda s: s & ~SLOT_PRESENT), f"{U}anon': slot 5: has no one place"),
    "nr_present": (slot("anon", lambda s: 0), f"{U}anon': nr_present: 100, but recounted 99"),
    "nr_swapped": (
        lambda m: m.users["none"].engine.resize(3) or slot("none", lambda s: SLOT_SWAPPED, 1)(m),
        f"{U}none': nr_swapped: 0, but recounted 1",
    ),
    "page of nobody": (foreign_page, f"{U}anon': slot 3, page 0x[0-9a-f]+: its record names no"),
    "page without mark": (flags("anon", PG_USER), f"{U}anon': slot 5, page 0x.*: its record names"),
    "page beyond memory": (
        slot("anon", lambda s: SLOT_PRESENT | 1 << 33),
        f"{U}anon': slot 5, page 0x200000000: its record names no user",
    ),
    "swapped slots": (swap_slots, f"{U}anon': slot 3, page 0x.*: its record names another"),
    "page twice": (same_page_twice, f"{U}anon': slot 3, page 0x.*: its record names another"),
    "index of a huge page": (
        block("huge", "next", 1),
        f"{U}huge': slot 0, page 0x.*: its record names another",
    ),
    "huge slot of a small page": (
        slot("huge", lambda s: s | SLOT_HUGE, 1026),
        f"{U}huge': slot 1026, page 0x.*: (its record|is of another size)",
    ),
    "small slot of a huge page": (
        slot("huge", lambda s: s & ~SLOT_HUGE, 512),
        f"{U}huge': slot 512, page 0x.*: is of another size than its slot says",
    ),
    "order of a slab's state": (
        lambda m: m.page_states.__setitem__(page(m, "slab"), 0x30 | 1),
        "(node 1 zone Normal|node 0 zone DMA32): managed",
    ),
    "mark of a state": (
        lambda m: m.page_states.__setitem__(page(m, "slab"), 0x20 | 2),
        "used pages that are no block of their user's order: pfn 0x",
    ),
    "lost page": (lost_page, "used pages that their user's slots do not hold: pfn 0x"),
    "isolated": (flags("anon", PG_ISOLATED), "isolated pages that nobody moves: pfn 0x"),
    "isolated huge page": (
        lambda m: m.pageblocks["flags"].__setitem__(
            page(m, "huge", 0) >> 9, PG_USER | PG_ISOLATED | PG_LRU
        ),
        "isolated pages that nobody moves: pfn 0x",
    ),
    "anonymous page on no list": (flags("anon", PG_LRU), "pages that are on no LRU list: pfn 0x"),
    "slab on a list": (flags("slab", PG_LRU), "pages that no LRU list is for: pfn 0x"),
    "tag": (tag, "node 1: inactive_anon: entries that count: 228, but recounted 227"),
    "tag of a huge page": (huge_tag, "node 1: inactive_anon: entries that count: 228, but"),
    "active": (flags("library", PG_ACTIVE), "node 1: inactive_file: entries that count: 20, but"),
    "mlocked": (flags("anon", PG_MLOCKED), "node 1: inactive_anon: entries that count: 228, but"),
    "munlocked": (
        flags("locked", PG_MLOCKED),
        "node 1: inactive_anon: pages without entry: pfn 0x",
    ),
    "mapped": (mapped_once_more, "node 1: nr_mapped: 31, but recounted 30"),
    "dirty": (flags("library", PG_DIRTY), "node 1: nr_dirty: 10, but recounted 11"),
    "writeback": (flags("tmpfs", PG_WRITEBACK), "node 1: nr_writeback: 10, but recounted 11"),
    "zone's list": (
        zone_item("nr_zone_inactive_anon"),
        "node 1 zone Movable: nr_zone_inactive_anon: 1251, but recounted 1250",
    ),
    "zone's dirty pages": (
        zone_item("nr_zone_write_pending"),
        "node 1 zone Movable: nr_zone_write_pending: 21, but recounted 20",
    ),
    "zone's mlocked pages": (
        zone_item("nr_mlock"),
        "node 1 zone Movable: nr_mlock: 11, but recounted 10",
    ),
    "token": (token("anon"), f"{U}anon': slot 5: holds the token 0x1, but 0x[0-9a-f]+ was written"),
}


@functools.cache
def caught(what: str) -> tuple[str, int]:
    """Corrupt a machine; return validate()'s message and the line of the check that raised."""
    m = built()
    CORRUPTIONS[what][0](m)
    with pytest.raises(ValidationError) as failure:
        m.validate()
    return str(failure.value), line_that_raised(failure.value, users_module)


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_corruption_is_seen(what: str) -> None:
    message, _ = caught(what)
    assert re.search(f"^{CORRUPTIONS[what][1]}", message), message


def test_each_check_catches_a_corruption() -> None:
    seen = {caught(what)[1] for what in CORRUPTIONS}
    checks = checks_of(users_module)
    silent = [first for first, last in checks if not any(first <= n <= last for n in seen)]
    assert len(checks) > 12
    assert not silent, f"no corruption is caught by the checks at lines {silent}"
