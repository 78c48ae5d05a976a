"""Everything that keeps a block from going: errno, log, what stays as it was, and how it ends.

A block of two on node 1, PFN 0x100000 up; node 0 has 1 GiB where what is moved goes:

    node 0, DMA32                     node 1
    |0        1 GiB|                  |memory32|memory33|
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from kmm import KernelError, Machine
from kmm.balloon_compaction import Balloon
from kmm.clock import SECOND
from kmm.errors import InvalidArgument
from kmm.hugetlbfs import HugetlbUser
from kmm.memory import User
from kmm.memory_block import MemoryNotifier, register_memory_notifier, unregister_memory_notifier
from kmm.mempolicy import new_policy
from kmm.offline_report import OfflineAttempt
from kmm.page_alloc import drain_all_pages
from kmm.params import MIGRATE_MOVABLE, MIGRATE_UNMOVABLE, PG_DIRTY
from kmm.snapshot import differences, dump
from kmm.virtio_mem import VirtioMem
from tests.conftest import DIMM, two_nodes
from tests.settle import settled_differences

BLOCK = 128 << 20
PFN = DIMM >> 12
STATE = "/sys/devices/system/memory/memory32/state"


@dataclass
class Case:
    """A machine with an obstacle in memory32, and what takes it away."""

    m: Machine
    remove: Callable[[], Any]
    user: str | None = None


def machine(kind: str, size: int = BLOCK) -> Machine:
    m = two_nodes(f"memhp_default_state=online_{kind}")
    m.plug("a", 1, DIMM, size)
    return m


def user_on_node_1(m: Machine, kind: str, pages: int, **more: Any) -> User:
    bind = new_policy(m, "bind", [1])
    made = User(m, "user", kind, pages, policy=bind, tokens=True, **more)
    made.fault(0, pages, PG_DIRTY if kind == "file" else 0)
    made.write_tokens(0, range(7, 7 + pages))
    return made


def kernel_page(kind: str) -> Case:
    m = machine("kernel")
    made = user_on_node_1(m, kind, 3)
    return Case(m, made.close, "user")


def unknown_page() -> Case:
    m = machine("kernel")
    pfn = m.alloc_pages(nid=1)
    return Case(m, lambda: m.free_pages(pfn))


def large_page(order: int) -> Case:
    m = machine("kernel")
    made = user_on_node_1(m, "slab", 2, order=order)
    return Case(m, made.close, "user")


def pinned() -> Case:
    m = machine("movable")
    made = user_on_node_1(m, "anon", 5)
    pin = m.pin(made, 3, long_term=False)
    return Case(m, lambda: m.unpin(pin), "user")


def pinned_long_term() -> Case:
    """What is pinned for long leaves a Movable zone first, so it is in the way in others."""
    m = machine("kernel")
    made = user_on_node_1(m, "anon", 5)
    pin = m.pin(made, 3)
    return Case(m, lambda: m.unpin(pin), "user")


def driver_that_refuses() -> Case:
    m = machine("movable")
    driver = Balloon(m, "balloon", 100)
    driver.user.policy = new_policy(m, "bind", [1])
    driver.inflate(100)
    driver.refuse()
    return Case(m, lambda: driver.refuse(False), "balloon")


def gigantic_page() -> Case:
    m = machine("kernel", 10 * BLOCK)
    m.write(POOL % 1048576, "1")
    return Case(m, lambda: m.write(POOL % 1048576, "0"), "hugepages-1048576kB")


def pinned_and_left() -> Case:
    m = machine("kernel")
    made = user_on_node_1(m, "anon", 5)
    pin = m.pin(made, 3)
    made.close()
    return Case(m, lambda: m.unpin(pin))


def pinned_huge() -> Case:
    m = machine("movable")
    made = user_on_node_1(m, "anon", 512, thp="madvise")
    pin = m.pin(made, 77, long_term=False)
    return Case(m, lambda: m.unpin(pin), "user")


def balloon() -> Case:
    m = machine("movable")
    driver = Balloon(m, "balloon", 100, movable=False)
    driver.user.policy = new_policy(m, "bind", [1])
    driver.inflate(100)
    return Case(m, driver.close, "balloon")


def poisoned_driver_page() -> Case:
    m = machine("movable")
    made = user_on_node_1(m, "driver_movable", 5)
    with pytest.raises(KernelError):
        m.write("/sys/devices/system/memory/hard_offline_page", hex(int(made.pfns()[2]) << 12))
    return Case(m, made.close, "user")


def nowhere_to_go() -> Case:
    m = machine("movable")
    user_on_node_1(m, "anon", 500)
    filler = User(m, "filler", "kernel", m.totalram_pages, policy=new_policy(m, "bind", [0]))
    before = -1
    while filler.nr_present > before:
        before = filler.nr_present
        with pytest.raises(KernelError):
            filler.fault(0, filler.pages)
        drain_all_pages(m)  # what CPUs keep is room too
    return Case(m, filler.close)


def veto() -> Case:
    m = machine("movable")
    user_on_node_1(m, "anon", 5)
    refuse = MemoryNotifier("veto", lambda m, action, arg: -16 if action == 2 else 0, 5)
    refuse.asks = lambda m, arg: -16
    register_memory_notifier(m, refuse)
    return Case(m, lambda: unregister_memory_notifier(m, refuse))


def veto_of_virtio_mem_s_block() -> Case:
    m = machine("movable")
    VirtioMem(m, "virtio", 1024).fake_offline(PFN + 512, 1024)
    refuse = MemoryNotifier("veto", lambda m, action, arg: -12 if action == 2 else 0, -5)
    refuse.asks = lambda m, arg: -12
    register_memory_notifier(m, refuse)
    return Case(m, lambda: unregister_memory_notifier(m, refuse))


def signal() -> Case:
    m = machine("movable")
    user_on_node_1(m, "anon", 5)
    m.signal_pending = True
    return Case(m, lambda: None)  # it is spent by the attempt


def in_use_in_movable() -> Case:
    m = machine("movable")
    pfn = m.alloc_pages(0, 0x100CCA, 1)
    return Case(m, lambda: m.free_pages(pfn))


POOL = "/sys/devices/system/node/node1/hugepages/hugepages-%dkB/nr_hugepages"


def reserved_huge_pages() -> Case:
    m = machine("movable")
    m.write(POOL % 2048, "10")
    mapped = HugetlbUser(m, "file", 10)
    return Case(m, mapped.close, "hugepages-2048kB")


def huge_pages_without_a_spare_one() -> Case:
    m = machine("movable")
    m.write(POOL % 2048, "10")
    bind = new_policy(m, "bind", [1])
    mapped = HugetlbUser(m, "file", 10, policy=bind, tokens=True)
    mapped.fault(0, 10)
    mapped.write_tokens(0, range(10))
    filler = User(m, "filler", "kernel", m.totalram_pages, policy=new_policy(m, "bind", [0]))
    with pytest.raises(KernelError):
        filler.fault(0, filler.pages)
    return Case(m, filler.close, "file")


CASES: dict[str, tuple[Callable[[], Case], int, str, str, str]] = {
    # name: how, errno, kind, reason, a line of the log
    "slab": (
        lambda: kernel_page("slab"),
        errno.EBUSY,
        "slab",
        "failure to isolate range",
        "page dumped because: unmovable page",
    ),
    "slab that shrinks": (
        lambda: kernel_page("slab_reclaimable"),
        errno.EBUSY,
        "slab",
        "failure to isolate range",
        "page dumped because: unmovable page",
    ),
    "large slab": (
        lambda: large_page(3),
        errno.EBUSY,
        "slab",
        "failure to isolate range",
        "page dumped because: unmovable page",
    ),
    "slab of a pageblock": (
        lambda: large_page(9),
        errno.EBUSY,
        "slab",
        "failure to isolate range",
        "page dumped because: unmovable page",
    ),
    "slab of two pageblocks": (
        lambda: large_page(10),
        errno.EBUSY,
        "slab",
        "failure to isolate range",
        "page dumped because: unmovable page",
    ),
    "page table": (
        lambda: kernel_page("page_table"),
        errno.EBUSY,
        "page table",
        "failure to isolate range",
        "page dumped because: unmovable page",
    ),
    "stack": (
        lambda: kernel_page("stack"),
        errno.EBUSY,
        "stack",
        "failure to isolate range",
        "page dumped because: unmovable page",
    ),
    "other kernel page": (
        lambda: kernel_page("kernel"),
        errno.EBUSY,
        "kernel page",
        "failure to isolate range",
        "page dumped because: unmovable page",
    ),
    "unknown page": (
        unknown_page,
        errno.EBUSY,
        "kernel page",
        "failure to isolate range",
        "page dumped because: unmovable page",
    ),
    "pinned": (
        pinned,
        errno.EINTR,
        "pinned",
        "signal backoff",
        "page dumped because: migration failure",
    ),
    "pinned long-term": (
        pinned_long_term,
        errno.EINTR,
        "pinned",
        "signal backoff",
        "page dumped because: migration failure",
    ),
    "driver that refuses": (
        driver_that_refuses,
        errno.EINTR,
        "driver",
        "signal backoff",
        "page dumped because: migration failure",
    ),
    "gigantic page": (
        gigantic_page,
        errno.EBUSY,
        "hugetlb",
        "failure to isolate range",
        "",
    ),
    "pinned, its user gone": (
        pinned_and_left,
        errno.EINTR,
        "pinned",
        "signal backoff",
        "page dumped because: migration failure",
    ),
    "pinned huge page": (
        pinned_huge,
        errno.EINTR,
        "pinned",
        "signal backoff",
        "page dumped because: migration failure",
    ),
    "balloon": (
        balloon,
        errno.EBUSY,
        "balloon",
        "unmovable page",
        "page dumped because: unmovable page",
    ),
    "poisoned page of a driver": (
        poisoned_driver_page,
        errno.EINTR,
        "poisoned",
        "signal backoff",
        "",
    ),
    "nowhere to go": (
        nowhere_to_go,
        errno.EINTR,
        "nowhere to go",
        "signal backoff",
        "page dumped because: migration failure",
    ),
    "huge pages that are reserved": (
        reserved_huge_pages,
        errno.EBUSY,
        "hugetlb",
        "failure to dissolve huge pages",
        "",
    ),
    "huge pages without a spare one": (
        huge_pages_without_a_spare_one,
        errno.EINTR,
        "hugetlb",
        "signal backoff",
        "page dumped because: migration failure",
    ),
    "veto": (veto, errno.EBUSY, "notifier", "notifier failure", ""),
    "veto behind virtio-mem": (
        veto_of_virtio_mem_s_block,
        errno.ENOMEM,
        "notifier",
        "notifier failure",
        "",
    ),
    "signal": (signal, errno.EINTR, "signal", "signal backoff", ""),
    "in use, in a Movable zone": (in_use_in_movable, errno.EINTR, "in use", "signal backoff", ""),
}


#: What a page that moved changes in a dump: where it is, and what is counted by node and zone.
MOVED = re.compile(
    r"/lru/.*|/nodes/\d+/vmstat/nr_(anon_pages|inactive_anon|active_anon)|/records/pages/\d+"
    r"|/users/\w+/slots|/zones/\d+/(free|vmstat/nr_zone_(in)?active_anon|managed_pages)"
)


def tokens_of(m: Machine) -> dict[str, list[int]]:
    """What all users that have tokens read back."""
    having = {name: user for name, user in m.users.items() if user.engine.tokens}
    return {name: user.read_tokens(0, user.pages).tolist() for name, user in having.items()}


def check_moved_only(before: dict[str, Any], m: Machine, attempt: OfflineAttempt) -> None:
    """What an attempt that was given up has done: some pages are elsewhere, none is lost."""
    found = settled_differences(before, dump(m))
    assert [line for line in found if not MOVED.fullmatch(line.split(": ")[0])] == []
    moved = [page for page in attempt.pages() if page.fate == "migrated"]
    assert bool(found) == bool(moved)
    for page in moved:
        assert page.user is not None and page.to is not None
        assert m.users[page.user].pfns(page.index, 1) == [page.to]
        assert not PFN <= page.to < PFN + BLOCK // 4096


@pytest.mark.parametrize("name", CASES)
def test_an_obstacle(name: str) -> None:
    how, code, kind, reason, line = CASES[name]
    case = how()
    m = case.m
    m.validate()
    before, tokens = dump(m), tokens_of(m)
    zone, present = m.memory_blocks[32].zone, {n: u.nr_present for n, u in m.users.items()}
    managed = sum(z.managed_pages for z in m.all_zones())
    said = m.explain_offline(32)
    assert (said.can_go, said.errno, said.obstacles[0].kind) == (False, code, kind)
    assert differences(before, dump(m)) == []
    assert said.obstacles[0].user == case.user
    assert said.obstacles[0].rule
    assert said.obstacles[0].helps
    log = len(m.log)
    attempt = m.offline_pages_report(32)
    assert attempt.errno == code
    assert attempt.reason == reason
    assert attempt.debug_line().endswith(f"failed due to {reason}")
    if said.obstacles[0].pfn is not None and attempt.blocked is not None:
        assert attempt.blocked == said.obstacles[0].pfn
        assert not line or f"pfn:{attempt.blocked:#x}" in "\n".join(m.log[log:])
    # Where the kernel prints nothing, nothing is printed; its pr_debug has the reason.
    assert line in m.log[log:] if line else m.log[log:] == []
    assert m.read(STATE) == "online\n"
    m.validate()
    assert m.memory_blocks[32].zone is zone
    assert {n: u.nr_present for n, u in m.users.items()} == present
    assert sum(z.managed_pages for z in m.all_zones()) == managed
    assert tokens_of(m) == tokens
    if reason == "signal backoff" and kind != "signal":
        # What could move has moved before the attempt was given up, and all that was isolated
        # is typed Movable; nothing else is different.
        check_moved_only(before, m, attempt)
        get = m.memmap_engine.get_pageblock_migratetype
        types = {get(pfn) for pfn in range(PFN, PFN + BLOCK // 4096, 512)}
        assert types == {MIGRATE_MOVABLE}
    else:
        assert settled_differences(before, dump(m)) == []
    case.remove()
    m.validate()
    assert m.explain_offline(32).can_go
    m.write(STATE, "offline")
    assert m.read(STATE) == "offline\n"
    m.validate()
    left = tokens_of(m)
    assert left == {name: tokens[name] for name in left}


def free_block() -> Case:
    return Case(machine("movable"), lambda: None)


def movable_pages() -> Case:
    m = machine("movable")
    user_on_node_1(m, "anon", 700, thp="always")
    return Case(m, lambda: None)


def mlocked_pages() -> Case:
    m = machine("movable")
    made = User(m, "user", "anon", 700, policy=new_policy(m, "bind", [1]), tokens=True)
    made.engine.locked = True
    made.fault(0, 700)
    made.write_tokens(0, range(700))
    return Case(m, lambda: None)


def poisoned_free_page() -> Case:
    m = machine("movable")
    user_on_node_1(m, "anon", 5)
    m.write("/sys/devices/system/memory/hard_offline_page", hex(PFN + 5000 << 12))
    return Case(m, lambda: None)


def pages_of_virtio_mem() -> Case:
    m = machine("movable")
    VirtioMem(m, "virtio", 1024).fake_offline(PFN + 512, 1024)
    return Case(m, lambda: None)


def pages_that_a_driver_moves() -> Case:
    case = driver_that_refuses()
    case.remove()
    return case


#: What is in no way: how, and what becomes of the pages that are not free.
GOES: dict[str, tuple[Callable[[], Case], dict[str, int]]] = {
    "free": (free_block, {}),
    "movable pages": (movable_pages, {"migrated": 700}),
    "mlocked": (mlocked_pages, {"migrated": 700}),
    "poisoned free page": (poisoned_free_page, {"migrated": 5, "poisoned": 1}),
    "balloon that moves its pages": (pages_that_a_driver_moves, {"migrated": 100}),
    "pages of virtio-mem": (pages_of_virtio_mem, {"offered": 1024}),
}


@pytest.mark.parametrize("name", GOES)
def test_what_is_no_obstacle(name: str) -> None:
    how, fates = GOES[name]
    m = how().m
    m.validate()
    before, tokens, log = dump(m), tokens_of(m), len(m.log)
    said = m.explain_offline(32)
    assert (said.can_go, said.errno, said.obstacles) == (True, 0, [])
    assert differences(before, dump(m)) == []
    attempt = m.offline_pages_report(32)
    assert (attempt.errno, attempt.reason, attempt.debug_line()) == (0, "", "")
    assert attempt.counts() == {"free": BLOCK // 4096 - sum(fates.values()), **fates}
    assert not [line for line in m.log[log:] if "page dumped" in line or "failed" in line]
    assert m.read(STATE) == "offline\n"
    assert tokens_of(m) == tokens
    m.validate()


#: Everything that may lie in a block, by which cases it is shown.
SHOWN_BY = {
    "free": {"free"},
    "migrated": {"movable pages"},
    "pinned long-term": {"pinned long-term", "pinned, its user gone"},
    "mlocked": {"mlocked"},
    "poisoned": {"poisoned page of a driver", "poisoned free page"},
    "slab": {"slab", "slab that shrinks", "large slab"},
    "kernel stack": {"stack"},
    "page table": {"page table"},
    "driver page whose driver refuses": {"driver that refuses"},
    "balloon without its driver's consent": {"balloon"},
    "balloon with its driver's consent": {"balloon that moves its pages", "pages of virtio-mem"},
    "hugetlb without room": {"huge pages without a spare one", "huge pages that are reserved"},
    "gigantic page": {"gigantic page"},
    "notifier veto": {"veto", "veto behind virtio-mem"},
    "signal": {"signal"},
    "no room elsewhere": {"nowhere to go"},
}


@pytest.mark.parametrize("name", SHOWN_BY)
def test_each_has_a_case(name: str) -> None:
    """A case shows errno, log, state and success; what is no obstacle only ever succeeds."""
    shown = SHOWN_BY[name]
    assert shown <= CASES.keys() | GOES.keys()
    goes = name in ("free", "migrated", "mlocked", "balloon with its driver's consent")
    assert shown.isdisjoint(CASES) == goes


@pytest.mark.parametrize(
    ("block", "code", "kind", "reason"),
    [
        (0, errno.EINVAL, "mixed zones", ""),
        (15, errno.EINVAL, "memory holes", "memory holes"),
        (39, errno.EBUSY, "reserved", "failure to isolate range"),  # boot's memmap at its end
    ],
)
def test_what_boot_laid_out_so_stays(block: int, code: int, kind: str, reason: str) -> None:
    m = two_nodes(memory="3G", nodes=[{"cpus": "0-1", "memory": "3G"}, {}])
    before = dump(m)
    said = m.explain_offline(block)
    assert {o.kind for o in said.obstacles} == {kind}
    attempt = m.offline_pages_report(block)
    assert (attempt.errno, attempt.reason) == (code, reason) == (said.errno, reason)
    if kind == "reserved":
        assert attempt.blocked == said.obstacles[0].pfn
        assert "(reserved|node=0|zone=2|" in m.log[-2]
    assert settled_differences(before, dump(m)) == []
    m.validate()


def test_the_memmap_that_describes_its_own_block_goes_along() -> None:
    m = two_nodes("memhp_default_state=online_kernel memory_hotplug.memmap_on_memory=1")
    m.plug("a", 1, DIMM, BLOCK)
    made = user_on_node_1(m, "slab", 1)
    said = m.explain_offline(32)
    assert [o.kind for o in said.obstacles] == ["slab"]
    made.close()
    assert m.explain_offline(32).can_go
    m.write(STATE, "offline")
    m.validate()


def test_mlocked_pages_are_no_obstacle() -> None:
    m = machine("movable")
    made = User(m, "locked", "anon", 700, policy=new_policy(m, "bind", [1]), tokens=True)
    made.engine.locked = True
    made.fault(0, 700)
    made.write_tokens(0, range(700))
    said = m.explain_offline(32)
    assert said.can_go
    assert said.moves == {("locked", "anon"): 700}
    m.write(STATE, "offline")
    assert (made.read_tokens(0, 700) == range(700)).all()
    m.validate()


def test_a_block_that_is_offline_and_one_that_is_not_there() -> None:
    m = two_nodes()
    m.plug("a", 1, DIMM, BLOCK)
    said = m.explain_offline(32)
    assert (said.errno, said.obstacles[0].kind) == (errno.EINVAL, "not online")
    assert m.offline_pages_report(32).errno == errno.EINVAL
    for ask in (m.explain_offline, m.offline_pages_report):
        with pytest.raises(KernelError, match="block_id: 77") as e:
            ask(77)
        assert e.value.errno == errno.EINVAL
        for bad in (32.0, True, "32", None):
            with pytest.raises(InvalidArgument, match=r"block_id: .*allowed: a whole number"):
                ask(bad)  # type: ignore[arg-type]
    m.validate()


@pytest.mark.parametrize(
    ("pageblock", "came_back"), [(0, set()), (63, {0}), (5, {0, 1, 2, 3, 4, 63})]
)
def test_a_failed_attempt_types_what_was_isolated_movable(
    pageblock: int, came_back: set[int]
) -> None:
    """Isolation begins with the first and the last pageblock, then goes upward from the second."""
    m = two_nodes("memhp_default_state=online_kernel")
    m.plug("a", 1, DIMM, 2 * BLOCK)
    engine = m.memmap_engine
    made = User(m, "user", "kernel", 120, order=9, policy=new_policy(m, "bind", [1]))
    made.fault(0, 120)
    at = {int(p): i for i, p in enumerate(made.pfns())}
    wanted = at.pop(PFN + 512 * pageblock)
    for index in at.values():
        made.release(index, 1)
    assert made.pfns()[wanted] == PFN + 512 * pageblock
    for i in range(64):
        engine.set_pageblock_migratetype(PFN + 512 * i, MIGRATE_UNMOVABLE)
    with pytest.raises(KernelError):
        m.write(STATE, "offline")
    types = [engine.get_pageblock_migratetype(PFN + 512 * i) for i in range(64)]
    assert {i for i, mt in enumerate(types) if mt == MIGRATE_MOVABLE} == came_back


def test_what_is_unpinned_meanwhile_goes() -> None:
    case = pinned()
    case.m.clock.call_after(3 * SECOND, case.remove)
    case.m.write(STATE, "offline")
    assert case.m.clock.now == 3 * SECOND
    case.m.validate()


def test_a_pinned_page_is_found_before_what_a_driver_holds_behind_it() -> None:
    m = machine("movable")
    driver = Balloon(m, "balloon", 10, movable=False)
    driver.user.policy = new_policy(m, "bind", [1])
    made = user_on_node_1(m, "anon", 3000)
    driver.inflate(10)
    low, high = sorted((int(made.pfns()[0]), int(driver.user.pfns()[0])))
    pin = m.pin(made, 0, long_term=False)
    want = errno.EINTR if low == int(made.pfns()[0]) else errno.EBUSY
    assert low != high
    assert m.explain_offline(32).errno == want
    assert m.offline_pages_report(32).errno == want
    m.validate()
    m.unpin(pin)
    m.validate()


def test_a_poisoned_page_of_a_driver_is_found_before_what_a_driver_holds_behind_it() -> None:
    m = machine("movable")
    page = user_on_node_1(m, "driver_movable", 1)
    pfn = int(page.pfns()[0])
    with pytest.raises(KernelError):
        m.write("/sys/devices/system/memory/hard_offline_page", hex(pfn << 12))
    driver = Balloon(m, "balloon", 10, movable=False)
    driver.user.policy = new_policy(m, "bind", [1])
    driver.inflate(10)
    assert int(driver.user.pfns()[0]) > pfn
    said = m.explain_offline(32)
    assert [o.kind for o in said.obstacles[:2]] == ["poisoned", "balloon"]
    assert said.errno == m.offline_pages_report(32).errno == errno.EINTR
    m.validate()


def test_a_gigantic_page_keeps_all_blocks_but_the_last_that_it_lies_in() -> None:
    m = two_nodes("memhp_default_state=online_kernel")
    m.plug("a", 1, DIMM, 10 * BLOCK)
    m.write(POOL % 1048576, "1")
    assert m.read(POOL % 1048576) == "1\n"
    for block in (32, 35):
        before = dump(m)
        said = m.explain_offline(block)
        assert [(o.kind, o.errno, o.pfn) for o in said.obstacles] == [("hugetlb", errno.EBUSY, PFN)]
        attempt = m.offline_pages_report(block)
        assert (attempt.errno, attempt.blocked) == (errno.EBUSY, PFN)
        assert settled_differences(before, dump(m)) == []
    said = m.explain_offline(39)
    assert said.can_go
    assert said.goes_along == {"free": 0, "dissolved": 32768}
    m.write(STATE.replace("32", "39"), "offline")
    assert m.read(POOL % 1048576) == "0\n"
    assert m.explain_offline(32).can_go
    m.validate()
