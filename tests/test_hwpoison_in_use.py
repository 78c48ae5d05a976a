"""Retiring pages that programs use: what the kernel says, and what users are left with.

The log lines are those of a real 6.1.192 that was asked to.
"""

from __future__ import annotations

import errno

import numpy as np
import pytest

from kmm import KernelError, Machine
from kmm.memory import User
from kmm.mempolicy import new_policy
from kmm.params import KPF_HWPOISON, PG_DIRTY
from kmm.snapshot import dump
from kmm.vmstat import all_node_items, all_vm_events
from tests.conftest import DIMM, two_nodes, with_nobody_to_kill
from tests.settle import settled_differences

BLOCK = 128 << 20
MEMORY = "/sys/devices/system/memory"


def machine(kind: str = "movable") -> Machine:
    m = two_nodes(f"memhp_default_state=online_{kind}")
    m.plug("a", 1, DIMM, 2 * BLOCK)
    return with_nobody_to_kill(m)


def user(m: Machine, kind: str, pages: int = 20, flags: int = 0, **more: str) -> User:
    made = User(m, "hog", kind, pages, policy=new_policy(m, "bind", [1]), tokens=True, **more)
    made.fault(0, pages, flags)
    made.write_tokens(0, np.arange(pages) + 7)
    if not flags:
        m.sync()
    return made


def retire(m: Machine, how: str, pfn: int) -> tuple[int, list[str]]:
    """Retire a page; the errno (0 if it went well) and what was logged."""
    log = len(m.log)
    try:
        m.write(f"{MEMORY}/{how}_offline_page", hex(pfn << 12))
    except KernelError as e:
        return e.errno or 0, m.log[log:]
    return 0, m.log[log:]


def poisoned(m: Machine, pfn: int) -> bool:
    return bool(int(m.kpageflags(pfn, 1)[0]) & KPF_HWPOISON) and pfn in m.hwpoison


@pytest.mark.parametrize("kind", ["anon", "shmem", "file"])
@pytest.mark.parametrize("locked", [False, True])
def test_soft_offline_moves_what_a_page_holds(kind: str, locked: bool) -> None:
    m = machine()
    made = user(m, kind, flags=PG_DIRTY)
    made.engine.locked = locked
    more = User(m, "more", kind, 5, policy=new_policy(m, "bind", [1]), tokens=True)
    more.engine.locked = locked
    more.fault(0, 5, PG_DIRTY)
    more.write_tokens(0, range(5))
    pfn = int(more.pfns()[3])
    assert retire(m, "soft", pfn) == (0, [])
    assert poisoned(m, pfn)
    assert int(more.pfns()[3]) not in (pfn, -1)
    assert (more.read_tokens(0, 5) == range(5)).all()
    assert m.num_poisoned_pages == 1
    assert all_vm_events(m)["pgmigrate_success"] == 1
    m.validate()
    assert retire(m, "soft", pfn) == (0, [f"soft_offline_page: {pfn:#x} page already poisoned"])
    # It does not come back, and is not in the way.
    more.close()
    m.validate()
    for block in (32, 33):
        m.write(f"{MEMORY}/memory{block}/state", "offline")
    m.validate()


def test_soft_offline_drops_a_clean_page_of_a_file() -> None:
    m = machine()
    made = user(m, "file")
    pfn = int(made.pfns()[3])
    assert retire(m, "soft", pfn) == (0, [f"soft_offline: {pfn:#x}: invalidated"])
    assert made.pfns()[3] == -1
    assert poisoned(m, pfn)
    assert all_node_items(m)["nr_file_pages"] == 19
    m.validate()


def test_soft_offline_of_what_is_held_fails() -> None:
    m = machine()
    made = user(m, "anon")
    pin = m.pin(made, 3, long_term=False)
    before = dump(m)
    code, log = retire(m, "soft", pin.pfn)
    assert code == errno.EBUSY
    assert log == [
        f"soft offline: {pin.pfn:#x}: page migration failed 1, type "
        "0x5fffffc00a000e(referenced|uptodate|dirty|mappedtodisk|swapbacked|node=1|zone=3|"
        "lastcpupid=0x1fffff)"
    ]
    assert settled_differences(before, dump(m)) == []
    m.unpin(pin)
    assert retire(m, "soft", pin.pfn) == (0, [])
    m.validate()


def test_soft_offline_of_a_page_whose_user_is_gone_fails_too() -> None:
    m = machine()
    made = user(m, "anon")
    pin = m.pin(made, 3, long_term=False)
    made.close()
    assert retire(m, "soft", pin.pfn)[0] == errno.EBUSY
    assert retire(m, "hard", pin.pfn) == (
        0,
        [f"Memory failure: {pin.pfn:#x}: recovery action for clean LRU page: Recovered"],
    )
    m.unpin(pin)
    m.validate()
    assert poisoned(m, pin.pfn)


def test_soft_offline_with_nowhere_to_go() -> None:
    m = machine()
    made = user(m, "anon")
    pfn = int(made.pfns()[3])
    filler = User(m, "filler", "shmem", m.totalram_pages)
    with pytest.raises(KernelError):
        filler.fault(0, filler.pages)
    before = dump(m)
    code, log = retire(m, "soft", pfn)
    assert code == errno.ENOMEM
    assert log[-1].startswith(f"soft offline: {pfn:#x}: page migration failed -12, type 0x")
    assert settled_differences(before, dump(m)) == []
    filler.close()
    assert retire(m, "soft", pfn) == (0, [])
    m.validate()


@pytest.mark.parametrize(
    ("kind", "flags", "mapped", "name", "extra"),
    [
        ("anon", 0, False, "dirty LRU page", []),
        ("file", PG_DIRTY, False, "dirty LRU page", []),
        ("file", 0, False, "clean LRU page", []),
        (
            "file",
            0,
            True,
            "clean LRU page",
            ["Memory failure: {pfn}: corrupted page was clean: dropped without side effects"],
        ),
    ],
)
def test_memory_failure_takes_a_page_from_its_user(
    kind: str, flags: int, mapped: bool, name: str, extra: list[str]
) -> None:
    m = machine()
    made = User(m, "hog", kind, 20, policy=new_policy(m, "bind", [1]), tokens=True)
    made.engine.mapped = mapped
    made.fault(0, 20, flags)
    made.write_tokens(0, np.arange(20) + 7)
    if not flags:
        m.sync()
    pfn = int(made.pfns()[3])
    want = [line.format(pfn=hex(pfn)) for line in extra]
    want.append(f"Memory failure: {pfn:#x}: recovery action for {name}: Recovered")
    assert retire(m, "hard", pfn) == (0, want)
    assert made.pfns()[3] == -1
    assert made.nr_present == 19
    assert poisoned(m, pfn)
    m.validate()
    made.fault(3, 1)  # whoever is not killed gets another page
    assert made.pfns()[3] != pfn
    m.write(f"{MEMORY}/memory32/state", "offline")
    m.validate()


def test_shmem_keeps_its_broken_page() -> None:
    m = machine()
    made = user(m, "shmem")
    pfn = int(made.pfns()[3])
    assert retire(m, "hard", pfn) == (
        0,
        [f"Memory failure: {pfn:#x}: recovery action for dirty LRU page: Recovered"],
    )
    assert made.pfns()[3] == pfn
    m.validate()
    # The block goes all the same, and takes the page along.
    report = m.offline_pages_report(32)
    assert report.counts()["poisoned"] == 1
    assert made.pfns()[3] == -1
    m.validate()


def test_shmem_that_lets_its_broken_page_go() -> None:
    m = machine()
    made = user(m, "shmem")
    pfn = int(made.pfns()[3])
    retire(m, "hard", pfn)
    made.close()
    assert poisoned(m, pfn)
    m.validate()


@pytest.mark.parametrize("how", ["soft", "hard"])
def test_a_huge_page_is_split_and_one_page_of_it_goes(how: str) -> None:
    m = machine()
    made = user(m, "anon", 512, thp="madvise")
    pfn = int(made.pfns()[7])
    code, log = retire(m, how, pfn)
    assert code == 0
    want = f"Memory failure: {pfn:#x}: recovery action for dirty LRU page: Recovered"
    assert log == ([] if how == "soft" else [want])
    assert poisoned(m, pfn)
    assert all_vm_events(m)["thp_split_page"] == 1
    assert (np.delete(made.read_tokens(0, 512), 7) == np.delete(np.arange(512) + 7, 7)).all()
    m.validate()


def test_a_huge_page_that_is_held_is_not_split() -> None:
    m = machine()
    made = user(m, "anon", 512, thp="madvise")
    pin = m.pin(made, 3, long_term=False)
    pfn = int(made.pfns()[9])
    assert retire(m, "soft", pfn) == (errno.EBUSY, [f"soft offline: {pfn:#x}: thp split failed"])
    assert retire(m, "hard", pfn) == (
        errno.EBUSY,
        [f"Memory failure: {pfn:#x}: recovery action for unsplit thp: Ignored"],
    )
    assert m.num_poisoned_pages == 1
    m.validate()
    m.unpin(pin)
    made.release(0, 1)  # splits it, and the mark stays with its page
    assert int(m.memmap["flags"][pfn]) & 16
    m.validate()


@pytest.mark.parametrize(("kind", "result"), [("anon", "Recovered"), ("file", "Failed")])
def test_a_page_that_is_pinned(kind: str, result: str) -> None:
    m = machine()
    made = user(m, kind, flags=PG_DIRTY)
    pin = m.pin(made, 3, long_term=False)
    code, log = retire(m, "hard", pin.pfn)
    assert code == (0 if result == "Recovered" else errno.EBUSY)
    line = f"Memory failure: {pin.pfn:#x}: dirty LRU page still referenced by 1024 users"
    assert (line in log) == (kind == "file")
    assert log[-1].endswith(f"recovery action for dirty LRU page: {result}")
    m.validate()
    m.unpin(pin)
    assert poisoned(m, pin.pfn)
    m.validate()


def test_what_a_driver_can_move_is_moved_only_softly() -> None:
    m = machine()
    made = User(m, "zram", "driver_movable", 5, policy=new_policy(m, "bind", [1]))
    made.fault(0, 5)
    first, second = (int(p) for p in made.pfns(0, 2))
    assert retire(m, "soft", first) == (0, [])
    assert made.pfns()[0] != first
    code, log = retire(m, "hard", second)
    assert (code, log[-1]) == (
        errno.EBUSY,
        f"Memory failure: {second:#x}: recovery action for unknown page: Ignored",
    )
    m.validate()


def test_a_broken_page_of_the_kernel_goes_along() -> None:
    m = machine("kernel")
    made = User(m, "tables", "page_table", 1, policy=new_policy(m, "bind", [1]))
    made.fault(0, 1)
    pfn = int(made.pfns()[0])
    with pytest.raises(KernelError):
        m.write(f"{MEMORY}/memory{pfn // 32768}/state", "offline")
    assert retire(m, "hard", pfn)[0] == errno.EBUSY
    m.write(f"{MEMORY}/memory{pfn // 32768}/state", "offline")
    assert made.nr_present == 0
    m.validate()
