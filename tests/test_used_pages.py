"""Pages in use under odd circumstances: nothing of them is lost, doubled or left behind."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from kmm import KernelError, Machine, _migrate, snapshot
from kmm._memory import PageUser
from kmm.memory import User
from kmm.mempolicy import new_policy
from kmm.migrate import MigrationTarget, migrate_pages
from kmm.params import (
    PG_DIRTY,
    PG_HWPOISON,
    PG_LRU,
    PG_PINNED,
    USER_ANON,
    USER_FILE,
    USER_MOVABLE_OPS,
)
from kmm.used_pages import live_entries, used_pages
from kmm.vmstat import all_node_items
from tests.conftest import DIMM, two_nodes

STATE = "/sys/devices/system/memory/memory%d/state"
MOVE = MigrationTarget(0x1464CA, 0, (0,))


def machine() -> Machine:
    m = two_nodes("memhp_default_state=online_movable")
    m.plug("a", 1, DIMM, 256 << 20)
    return m


def anon(m: Machine, pages: int, name: str = "hog", **more: object) -> User:
    policy = new_policy(m, "bind", [1])
    user = User(m, name, "anon", pages, policy=policy, **more)  # type: ignore[arg-type]
    user.grow(pages)
    return user


def lru(m: Machine, nid: int = 1, which: int = 0) -> list[int]:
    pages, _ = used_pages(m)
    return pages.pfn[live_entries(m, pages, nid, which)[0]].tolist()


def isolate(m: Machine, start: int, end: int) -> np.ndarray:
    out, refused = np.zeros(end - start, np.uint64), np.zeros(4, np.uint64)
    n, _ = _migrate.isolate_range(m.memmap_engine, start, end, out, refused)
    return out[:n]


# -- users --------------------------------------------------------------


def test_a_user_lives_as_long_as_its_pages_point_to_it() -> None:
    m = machine()
    user = PageUser(m.memmap_engine, USER_ANON, 10)
    number = user.number
    assert user.fault_in(m, 0, 10, 0x100CCA, 1, 2, 0) == 10
    del user
    gc.collect()
    assert m.memmap_engine.user_numbers() == [number]
    # Whoever looks at the pages still finds somebody.
    isolate(m, DIMM >> 12, (DIMM >> 12) + 65536)


def test_a_user_with_pages_is_not_forgotten() -> None:
    m = machine()
    user = anon(m, 10)
    with pytest.raises(ValueError, match="close: 10 pages, 0 swapped"):
        user.engine.close()
    m.validate()


def test_a_closed_user_touches_nothing() -> None:
    m = machine()
    user = anon(m, 10)
    user.close()
    for call in (
        lambda: user.fault(0, 1),
        lambda: user.release(0, 1),
        lambda: user.pfns(),
        lambda: user.grow(1),
        user.close,
    ):
        with pytest.raises(KernelError, match="user 'hog': is closed"):
            call()
    with pytest.raises(ValueError, match="it is closed"):
        user.engine.fault_in(m, 0, 1, 0xCC0, 0, 1, 0)
    # Its number goes to the next; what is left of the old one does not get there.
    other = User(m, "other", "anon", 5)
    assert other.engine.number == 1
    m.validate()


def test_there_are_only_so_many_users() -> None:
    m = machine()
    for _ in range(65535):
        PageUser(m.memmap_engine, USER_FILE, 0)
    with pytest.raises(KernelError, match="'one more': PageUser: 65535 users are as many") as e:
        User(m, "one more", "file", 0)
    assert e.value.errno == 12
    assert "one more" not in m.users


@pytest.mark.parametrize("size", [-1, (1 << 34) + 1])
def test_a_table_that_no_index_reaches(size: int) -> None:
    m = machine()
    with pytest.raises(ValueError, match=f"nr_slots {size}"):
        PageUser(m.memmap_engine, USER_ANON, size)
    user = anon(m, 3)
    with pytest.raises(ValueError, match=f"resize: {size} slots; allowed: 0 to 17179869184"):
        user.engine.resize(size)
    assert user.nr_present == 3
    m.validate()


@pytest.mark.parametrize("kind", [USER_ANON, USER_FILE, USER_MOVABLE_OPS])
def test_what_moves_page_by_page_has_single_pages(kind: int) -> None:
    with pytest.raises(ValueError, match="order 3"):
        PageUser(machine().memmap_engine, kind, 10, 3)


def test_a_driver_that_moves_pages_has_single_ones() -> None:
    with pytest.raises(KernelError, match="order: 3"):
        User(machine(), "d", "driver_movable", 10, order=3)


def test_the_kernel_itself_has_blocks_of_an_order_instead_of_huge_pages() -> None:
    with pytest.raises(
        KernelError, match="thp: 'always'; allowed: 'never' for pages of kind 'slab'"
    ):
        User(machine(), "s", "slab", 10, thp="always")


def test_ranges_that_overflow() -> None:
    m = machine()
    user = anon(m, 10)
    for start, n in ((1, (1 << 63) - 1), ((1 << 63) - 1, 1), (-1, 2), (0, -1), (11, 0)):
        with pytest.raises(ValueError, match="allowed: 0 to 10"):
            user.engine.pfns(start, n)
    m.validate()


def test_marks_that_a_new_page_does_not_bear() -> None:
    m = machine()
    user = User(m, "f", "file", 10)
    with pytest.raises(KernelError, match="flags: 0x4; allowed: marks out of"):
        user.fault(0, 3, PG_LRU)
    assert user.nr_present == 0
    m.validate()


# -- pages have one user --------------------------------------------------------------


def test_a_page_gets_no_second_user() -> None:
    m = machine()
    user, other = anon(m, 3), User(m, "other", "anon", 3)
    pfn = int(user.pfns()[0])
    for bad in (pfn, 5, 1 << 40):
        with pytest.raises(ValueError, match="attach: slot 0"):
            other.engine.attach(m, 0, bad)
    other.engine.attach(m, 0, m.alloc_pages())
    assert other.nr_present == 1
    huge, third = anon(m, 512, "huge", thp="always"), User(m, "third", "anon", 512)
    with pytest.raises(ValueError, match="attach_huge: slot 0"):
        third.engine.attach_huge(m, 0, int(huge.pfns()[0]))
    third.engine.attach_huge(m, 0, m.alloc_pages(9))
    assert third.nr_present == 512
    m.validate()


def test_a_page_does_not_move_to_one_in_use() -> None:
    m = machine()
    user, other = anon(m, 3), anon(m, 3, "other")
    pfn, taken = int(user.pfns()[0]), int(other.pfns()[0])
    isolate(m, pfn, pfn + 1)
    for bad in (taken, m.alloc_pages(1), 1 << 40):
        with pytest.raises(ValueError, match="is no unused block of order 0"):
            _migrate.migrate_to(m, pfn, bad, 0)
    to = m.alloc_pages()
    assert _migrate.migrate_to(m, pfn, to, 0)
    assert int(user.pfns()[0]) == to
    m.validate()


def test_the_allocator_leaves_pages_of_users_alone() -> None:
    m = machine()
    user = anon(m, 600, thp="always")
    for pfn, order in ((user.pfns()[0], 9), (user.pfns()[550], 0), (user.pfns()[3], 0)):
        with pytest.raises(KernelError):
            m.free_pages(int(pfn), order)
        with pytest.raises(KernelError):
            m.split_page(int(pfn), order)
    m.validate()


def test_marks_of_a_users_page_are_not_overwritten() -> None:
    m = machine()
    user = anon(m, 3)
    pfn = int(user.pfns()[0])
    flags = int(m.memmap["flags"][pfn])
    for bad in (0, PG_HWPOISON, flags ^ PG_DIRTY, flags ^ PG_LRU):
        with pytest.raises(ValueError, match="which its user needs"):
            m.memmap_engine.set_page_flags(pfn, bad)
    with pytest.raises(ValueError, match="set_page_flags: pfn 0x"):
        m.memmap_engine.set_page_flags(1 << 40, 0)
    m.memmap_engine.set_page_flags(pfn, flags | PG_PINNED)
    m.validate()


# -- pages that are held, broken or gone -----------------------------------------------------------


def test_a_pinned_page_outlives_its_user() -> None:
    m = machine()
    user = anon(m, 3)
    pfn = int(user.pfns()[1])
    m.memmap_engine.set_page_flags(pfn, int(m.memmap["flags"][pfn]) | PG_PINNED)
    assert user.release(0, 3) == 2
    user.close()
    m.validate()
    with pytest.raises(KernelError):
        m.free_pages(pfn)
    m.memmap_engine.set_page_flags(pfn, 0)
    m.free_pages(pfn)
    m.validate()


def test_a_page_let_go_while_it_is_isolated() -> None:
    m = machine()
    user = anon(m, 700, thp="always")
    pfns = isolate(m, DIMM >> 12, (DIMM >> 12) + 65536)
    assert len(pfns) == 1 + 188
    user.release(100, 600)
    result = migrate_pages(m, pfns, MOVE)
    # What is nobody's any more need not move, which is as good.
    assert (result.nr_succeeded, result.nr_failed) == (len(pfns), 0)
    assert all_node_items(m)["nr_isolated_anon"] == 0
    m.validate()


def test_a_page_let_go_while_another_is_found_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import kmm.migrate as module

    m = machine()
    user = anon(m, 5)
    pfns = isolate(m, DIMM >> 12, (DIMM >> 12) + 65536)
    real = module.alloc_migration_target

    def slow(m: Machine, pfn: int, target: MigrationTarget) -> int:
        to = real(m, pfn, target)
        user.release(0, 5)
        return to

    monkeypatch.setattr(module, "alloc_migration_target", slow)
    monkeypatch.setattr(module._migrate, "migrate_pages_once", lambda *a: a[3] if a[3] else 0)
    work = module._List(m, pfns, MOVE)
    assert not work._slowly(0, 0)
    assert work.status[0] == 4
    assert user.nr_present == 0
    m.validate()


def test_migration_within_migration() -> None:
    """To find room for a page, others have to move."""
    import kmm.migrate as module

    m = machine()
    user, other = anon(m, 50, tokens=True), anon(m, 2000, "other", tokens=True)
    user.write_tokens(0, np.arange(50))
    other.write_tokens(0, np.arange(2000))
    first = isolate(m, int(user.pfns()[0]), int(user.pfns()[0]) + 1)
    scratch = m.scratch
    inner = {}

    def all_batches(self: module._List, real=module._List.all_batches) -> None:  # type: ignore[no-untyped-def]
        if not inner:
            inner["done"] = True
            pfns = isolate(m, DIMM >> 12, (DIMM >> 12) + 65536)
            assert migrate_pages(m, pfns, MOVE).nr_succeeded == len(pfns)
        real(self)

    module_list, module._List.all_batches = module._List.all_batches, all_batches  # type: ignore[method-assign]
    try:
        result = migrate_pages(m, first, MOVE)
    finally:
        module._List.all_batches = module_list  # type: ignore[method-assign]
    assert result.nr_succeeded == 1
    assert m.scratch is scratch
    assert user.read_tokens(0, 50).tolist() == list(range(50))
    assert other.read_tokens(0, 2000).tolist() == list(range(2000))
    m.validate()


def test_tags_come_round() -> None:
    """Lists begin shortly before their tags do: entries before and after are told apart."""
    m = machine()
    user = anon(m, 900)
    assert lru(m) == user.pfns().tolist()
    tags = m.memmap_engine.lru_entries(1, 0)[0] >> np.uint64(34)
    assert tags[0] > 1 << 29 and tags[-1] < 1 << 29
    user.release(0, 850)
    # Gaps are closed when the ring is full, and everything keeps its place.
    other = anon(m, 3000, "other")
    assert lru(m) == [*user.pfns(850, 50).tolist(), *other.pfns().tolist()]
    m.validate()


def test_a_huge_page_with_a_broken_part_is_split() -> None:
    m = machine()
    user = anon(m, 512, thp="always", tokens=True)
    user.write_tokens(0, np.arange(512) + 1)
    pfn = int(user.pfns()[7])
    m.write("/sys/devices/system/memory/hard_offline_page", hex(pfn << 12))
    assert f"Memory failure: {pfn:#x}: recovery action for dirty LRU page: Recovered" in m.log
    assert user.nr_present == 511
    want = [i + 1 if i != 7 else 0 for i in range(512)]
    assert user.read_tokens(0, 512).tolist() == want
    assert all_node_items(m)["nr_anon_pages"] == 511
    assert m.num_poisoned_pages == 1
    m.validate()
    # The rest leaves the block, and the broken page goes with it.
    for block in (32, 33):
        m.write(STATE % block, "offline")
    assert user.read_tokens(0, 512).tolist() == want
    m.validate()


def test_a_clean_page_that_breaks_is_read_again() -> None:
    m = machine()
    user = User(m, "f", "file", 5, policy=new_policy(m, "bind", [1]))
    user.grow(5)
    pfn = int(user.pfns()[2])
    m.write("/sys/devices/system/memory/hard_offline_page", hex(pfn << 12))
    assert f"Memory failure: {pfn:#x}: recovery action for clean LRU page: Recovered" in m.log
    assert user.fault(0, 5) == 1
    assert int(user.pfns()[2]) != pfn
    m.validate()


def test_a_kernel_page_that_breaks_stays_with_its_user() -> None:
    m = machine()
    user = User(m, "cache", "slab", 3)
    user.grow(3)
    pfn = int(user.pfns()[1])
    with pytest.raises(KernelError) as e:
        m.write("/sys/devices/system/memory/hard_offline_page", hex(pfn << 12))
    assert e.value.errno == 16
    assert user.nr_present == 3
    m.validate()
    user.close()
    assert m.alloc_pages() != pfn
    m.validate()


# -- what is dumped --------------------------------------------------------------


def test_differences_see_users() -> None:
    m = machine()
    user = anon(m, 5, tokens=True)
    user.write_tokens(0, np.arange(5))
    before = snapshot.dump(m)
    assert not snapshot.differences(before, snapshot.dump(m))
    user.write_tokens(2, [77])
    (line,) = snapshot.differences(before, snapshot.dump(m))
    assert line.startswith("/users/hog/tokens: ")
    user.write_tokens(2, [2])
    pfns = isolate(m, int(user.pfns()[0]), int(user.pfns()[0]) + 1)
    _migrate.putback_movable_pages(m.memmap_engine, pfns)
    (line,) = snapshot.differences(before, snapshot.dump(m))
    assert line.startswith("/lru/node 1 inactive_anon: ")
    User(m, "new", "slab", 1)
    lines = snapshot.differences(before, snapshot.dump(m))
    assert any(line.startswith("/users/new: None -> ") for line in lines)
    m.validate()
