"""Pins: what they hold in place, what has to move first, and what they leave behind."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from kmm import GFP_KERNEL, KernelError, Machine
from kmm.gup import pins_of
from kmm.memory import User
from kmm.mempolicy import new_policy
from kmm.page_alloc import drain_all_pages
from kmm.snapshot import differences, dump
from kmm.vmstat import all_node_items, all_vm_events
from tests.conftest import DIMM, two_nodes, with_nobody_to_kill
from tests.settle import settled_differences

BLOCK = 128 << 20
MEMALLOC = 0x20000  # takes what the marks keep
STATE = "/sys/devices/system/memory/memory32/state"


def machine(kind: str = "movable") -> Machine:
    m = two_nodes(f"memhp_default_state=online_{kind}")
    m.plug("a", 1, DIMM, BLOCK)
    return with_nobody_to_kill(m)


def user(m: Machine, pages: int, kind: str = "anon", thp: str = "never") -> User:
    made = User(m, "hog", kind, pages, policy=new_policy(m, "preferred", [1]), tokens=True, thp=thp)
    made.fault(0, pages)
    made.write_tokens(0, np.arange(pages) + 7)
    return made


def holds_what_it_wrote(made: User) -> bool:
    return bool((made.read_tokens(0, made.pages) == np.arange(made.pages) + 7).all())


def counters(m: Machine) -> tuple[int, int]:
    items = all_node_items(m)
    return items["nr_foll_pin_acquired"], items["nr_foll_pin_released"]


def zone_of(m: Machine, pfn: int) -> tuple[int, int]:
    zone = m.page_zone(pfn)
    assert zone is not None
    return zone.nid, zone.zone_idx


def test_a_page_that_is_held_for_long_leaves_the_movable_zone() -> None:
    """As a real kernel: pinned, let go and moved to node 0's DMA32, pinned there."""
    m = machine()
    made = user(m, 100)
    assert zone_of(m, int(made.pfns()[3])) == (1, 3)
    pin = m.pin(made, 3)
    assert zone_of(m, int(made.pfns()[3])) == (0, 1)
    assert counters(m) == (2, 1)
    assert all_vm_events(m)["pgmigrate_success"] == 1
    assert holds_what_it_wrote(made)
    m.validate()
    m.write(STATE, "offline")  # it is not in the way
    m.unpin(pin)
    assert counters(m) == (2, 2)
    made.close()
    m.validate()


def test_one_that_is_held_for_a_moment_stays() -> None:
    m = machine()
    made = user(m, 10)
    where = made.pfns()
    pin = m.pin(made, 3, long_term=False)
    assert (made.pfns() == where).all()
    assert counters(m) == (1, 0)
    # Whoever then wants it for long finds it held (the kernel says ENOMEM), and nothing changes.
    before = dump(m)
    free = sum(z.nr_free_pages + z.pcp_pages() for z in m.all_zones())
    with pytest.raises(KernelError, match="is held by somebody") as e:
        m.pin(made, 3)
    assert e.value.errno == errno.ENOMEM
    assert counters(m) == (2, 1)
    assert all_vm_events(m)["pgmigrate_fail"] == 1
    assert pins_of(m, pin.pfn) == [pin]
    # It was taken off its list and is the latest there now; targets came and went back.
    others = {d.split(":")[0].split("/")[1] for d in differences(before, dump(m))}
    assert others == {"lru", "nodes", "records", "zones"}
    assert (made.pfns() == where).all()
    assert sum(z.nr_free_pages + z.pcp_pages() for z in m.all_zones()) == free
    m.unpin(pin)
    pin = m.pin(made, 3)
    assert zone_of(m, pin.pfn) == (0, 1)
    m.unpin(pin)
    m.validate()


def test_an_absent_page_that_is_to_stay_is_not_allocated_as_movable() -> None:
    m = machine()
    made = User(m, "hog", "anon", 10, policy=new_policy(m, "bind", [1]))
    before = dump(m)
    with pytest.raises(KernelError) as e:
        m.pin(made, 0)  # node 1 has a Movable zone only
    assert e.value.errno == errno.ENOMEM
    assert settled_differences(before, dump(m)) == []
    made.policy = new_policy(m, "preferred", [1])
    pin = m.pin(made, 0)
    assert zone_of(m, pin.pfn) == (0, 1)
    assert counters(m) == (1, 0)
    m.unpin(pin)
    m.validate()


def test_a_huge_page_is_held_as_a_whole() -> None:
    m = machine()
    made = user(m, 1024, thp="madvise")
    pin = m.pin(made, 700)
    assert (pin.nr_pages, pin.pfn % 512) == (512, 0)
    assert zone_of(m, pin.pfn) == (0, 1)
    assert zone_of(m, int(made.pfns()[0])) == (1, 3)
    assert all_vm_events(m)["thp_migration_success"] == 1
    assert holds_what_it_wrote(made)
    again = m.pin(made, 701)
    m.unpin(pin)
    assert pins_of(m, pin.pfn + 3) == [again]
    m.unpin(again)
    assert pins_of(m, pin.pfn + 3) == []
    m.validate()


def test_a_huge_page_without_room_elsewhere_is_moved_in_parts() -> None:
    m = machine()
    made = user(m, 512, thp="madvise")
    # No block of order 9 is free on node 0, single pages are.
    filler = User(m, "filler", "kernel", 600000, policy=new_policy(m, "bind", [0]))
    with pytest.raises(KernelError):
        filler.fault(0, filler.pages)
    for order in (10, 9, 9):
        m.alloc_pages_bulk(1000, order, GFP_KERNEL | MEMALLOC, 0)
        drain_all_pages(m)
    for i in range(0, 40000, 2):
        filler.release(i, 1)
    pin = m.pin(made, 5)
    assert pin.nr_pages == 1
    assert zone_of(m, pin.pfn) == (0, 1)
    assert holds_what_it_wrote(made)
    m.unpin(pin)
    m.validate()


@pytest.mark.parametrize(
    ("kind", "thp"), [("anon", "never"), ("anon", "madvise"), ("shmem", "never"), ("file", "never")]
)
def test_pages_that_lose_their_user_are_free_when_they_are_let_go(kind: str, thp: str) -> None:
    m = machine("kernel")
    free = sum(z.nr_free_pages + z.pcp_pages() for z in m.all_zones())
    made = user(m, 512, kind, thp)
    pin = m.pin(made, 9)
    other = m.pin(made, 9)
    made.close()
    m.validate()
    assert sum(z.nr_free_pages + z.pcp_pages() for z in m.all_zones()) == free - pin.nr_pages
    with pytest.raises(KernelError):
        m.free_pages(pin.pfn, 9 if pin.nr_pages > 1 else 0)
    m.unpin(pin)
    m.validate()
    assert sum(z.nr_free_pages + z.pcp_pages() for z in m.all_zones()) == free - pin.nr_pages
    m.unpin(other)
    assert sum(z.nr_free_pages + z.pcp_pages() for z in m.all_zones()) == free
    m.validate()


def test_parts_of_a_split_huge_page_stay_as_long_as_one_pin_is_there() -> None:
    m = machine("kernel")
    made = user(m, 512, thp="madvise")
    pin = m.pin(made, 0)
    made.release(100, 1)  # splits it; the page that was let go is held all the same
    small = m.pin(made, 7)
    assert small.nr_pages == 1
    m.unpin(pin)
    assert pins_of(m, small.pfn) == [small]
    made.close()
    m.validate()
    m.unpin(small)
    m.validate()
    assert m.pins == {}


def test_what_cannot_be_pinned() -> None:
    m = machine()
    made = user(m, 5)
    slab = User(m, "slab", "slab", 3)
    pin = m.pin(made, 1, long_term=False)
    m.unpin(pin)
    for act, word in (
        (lambda: m.pin(slab, 0), "user"),
        (lambda: m.pin(made, 5), "index"),
        (lambda: m.pin(made, -1), "index"),
        (lambda: m.pin("hog", 0), "user"),  # type: ignore[arg-type]
        (lambda: m.pin(User(machine(), "x", "anon", 1), 0), "user"),
        (lambda: m.unpin(pin), "pin"),
        (lambda: m.unpin(None), "pin"),  # type: ignore[arg-type]
    ):
        with pytest.raises(KernelError, match=word) as e:
            act()
        assert e.value.errno == errno.EINVAL
    m.validate()
