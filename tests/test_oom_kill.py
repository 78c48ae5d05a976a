"""When nothing can be reclaimed, the task goes whose end helps most; the log says so."""

from __future__ import annotations

import errno
import re

import pytest

from kmm import GFP_KERNEL, KernelError, Machine
from kmm.errors import OutOfMemory
from kmm.gfp import __GFP_NOFAIL, __GFP_NOWARN, __GFP_RETRY_MAYFAIL
from kmm.memory import User
from kmm.mempolicy import new_policy
from kmm.page_alloc import __alloc_pages
from kmm.params import PG_PINNED, SLOT_PFN
from kmm.vmstat import all_vm_events
from tests.conftest import DIMM, two_nodes

NOFS = GFP_KERNEL & ~0x80


def task(m: Machine, name: str, pages: int, node: int | None = None, adj: int = 0) -> User:
    policy = {} if node is None else {"policy": new_policy(m, "bind", [node])}
    user = User(m, name, "anon", pages, **policy)  # type: ignore[arg-type]
    user.oom_score_adj = adj
    return user


def use_up(m: Machine, gfp: int = GFP_KERNEL) -> None:
    """Let the kernel take pages until a request fails."""
    with pytest.raises(OutOfMemory):
        while True:
            m.alloc_pages(0, gfp)


def killed(m: Machine) -> list[str]:
    return [name for line in m.log for name in re.findall(r"Killed process \d+ \((\w+)\)", line)]


def test_the_largest_goes_and_the_request_is_served(m: Machine) -> None:
    small, large = task(m, "small", 20_000), task(m, "large", 60_000)
    for user in (small, large):
        user.fault(0, user.pages)
    while not killed(m):
        m.alloc_pages()
    assert (killed(m), small.nr_present, large.nr_present) == (["large"], 20_000, 0)
    assert all_vm_events(m)["oom_kill"] == 1
    with pytest.raises(OutOfMemory, match="'large' was killed"):
        large.fault(0, 1)
    m.validate()
    use_up(m)
    assert killed(m) == ["large", "small"]
    m.validate()


def test_scores_decide_and_some_are_never_killed(m: Machine) -> None:
    users = [
        task(m, "never", 60_000, adj=-1000),
        task(m, "spared", 40_000, adj=-100),
        task(m, "wanted", 10_000, adj=200),
        task(m, "plain", 20_000),
    ]
    for user in users:
        user.fault(0, user.pages)
    use_up(m)
    assert killed(m) == ["wanted", "plain", "spared"]
    assert users[0].nr_present == 60_000
    m.validate()


def test_of_equals_the_later_one_goes(m: Machine) -> None:
    for name in ("first", "second"):
        task(m, name, 30_000).fault(0, 30_000)
    while not killed(m):
        m.alloc_pages()
    assert killed(m) == ["second"]


def test_files_and_kernel_users_are_no_victims_and_pinned_pages_stay(m: Machine) -> None:
    kernel = User(m, "kernel", "kernel", 50_000)
    kernel.fault(0, 50_000)
    shmem = User(m, "shmem", "shmem", 50_000)
    shmem.fault(0, 50_000)
    a = task(m, "a", 100)
    a.fault(0, 100)
    pinned = int(a.engine.slots[3]) & SLOT_PFN
    m.memmap["flags"][pinned] |= PG_PINNED
    use_up(m)
    assert killed(m) == ["a"]
    assert (kernel.nr_present, shmem.nr_present) == (50_000, 50_000)
    assert m.memmap_engine.is_allocated(pinned, 0)
    m.validate()


def test_a_request_of_some_nodes_kills_who_is_there() -> None:
    m = two_nodes("memhp_default_state=online_movable")
    m.plug("a", 1, DIMM, 1 << 28)
    large, small = task(m, "large", 100_000, 0), task(m, "small", 30_000, 1)
    large.fault(0, 100_000)
    small.fault(0, 30_000)
    hog = task(m, "hog", 40_000, 1)
    hog.oom_score_adj = -1000
    hog.fault(0, 40_000)
    assert killed(m) == ["small"]
    assert large.nr_present == 100_000
    summary = next(line for line in m.log if line.startswith("oom-kill:"))
    assert summary == (
        "oom-kill:constraint=CONSTRAINT_MEMORY_POLICY,nodemask=1,cpuset=/,mems_allowed=0-1,"
        f"global_oom,task_memcg=/,task=small,pid={small.engine.number},uid=0"
    )
    m.validate()


def test_the_log_has_the_recorded_shape() -> None:
    m = two_nodes("memhp_default_state=online_movable")
    m.plug("a", 1, DIMM, 1 << 28)
    before = len(m.log)
    hog = task(m, "hog", 102_400, 1)
    with pytest.raises(OutOfMemory, match="'hog' was killed"):
        hog.fault(0, 102_400)
    log = m.log[before:]
    assert log[0] == (
        "hog invoked oom-killer: gfp_mask=0x140dca(GFP_HIGHUSER_MOVABLE|__GFP_COMP|__GFP_ZERO), "
        "order=0, oom_score_adj=0"
    )
    shape = [
        r"Mem-Info:",
        r"active_anon:\d+ inactive_anon:\d+ isolated_anon:0",
        r" active_file:0 inactive_file:0 isolated_file:0",
        r" unevictable:0 dirty:0 writeback:0",
        r" slab_reclaimable:\d+ slab_unreclaimable:\d+",
        r" mapped:\d+ shmem:\d+ pagetables:\d+",
        r" sec_pagetables:0 bounce:0",
        r" kernel_misc_reclaimable:0",
        r" free:\d+ free_pcp:\d+ free_cma:0",
        r"Node 1 active_anon:0kB inactive_anon:\d+kB active_file:0kB inactive_file:0kB "
        r"unevictable:0kB isolated\(anon\):0kB isolated\(file\):0kB mapped:0kB dirty:0kB "
        r"writeback:0kB shmem:0kB shmem_thp: 0kB shmem_pmdmapped: 0kB anon_thp: 0kB "
        r"writeback_tmp:0kB kernel_stack:0kB pagetables:0kB sec_pagetables:0kB "
        r"all_unreclaimable\? yes",
        r"Node 1 Movable free:\d+kB boost:0kB min:\d+kB low:\d+kB high:\d+kB "
        r"reserved_highatomic:0KB active_anon:0kB inactive_anon:\d+kB active_file:0kB "
        r"inactive_file:0kB unevictable:0kB writepending:0kB present:262144kB managed:262144kB "
        r"mlocked:0kB bounce:0kB free_pcp:\d+kB local_pcp:\d+kB free_cma:0kB",
        r"lowmem_reserve\[\]: 0 0 0 0 0",
        r"Node 1 Movable: \d+\*4kB .*= \d+kB",
        r"Node 1 hugepages_total=0 hugepages_free=0 hugepages_surp=0 hugepages_size=2048kB",
        r"\d+ total pagecache pages",
        r"0 pages in swap cache",
        r"Free swap  = 0kB",
        r"Total swap = 0kB",
        r"327550 pages RAM",
        r"0 pages HighMem/MovableOnly",
        r"\d+ pages reserved",
        r"0 pages hwpoisoned",
        r"Tasks state \(memory values in pages\):",
        r"\[  pid  \]   uid  tgid total_vm      rss pgtables_bytes swapents oom_score_adj name",
        r"\[ {6}\d\] {5}0 {5}\d {3}102400 {4}\d{5} {8}0 {8}0             0 hog",
        r"oom-kill:.*",
        r"Out of memory: Killed process \d \(hog\) total-vm:409600kB, anon-rss:\d+kB, "
        r"file-rss:0kB, shmem-rss:0kB, UID:0 pgtables:0kB oom_score_adj:0",
    ]
    for line, pattern in zip(log[1:], shape, strict=True):
        assert re.fullmatch(pattern, line), line
    # The free blocks of the last line of a zone add up to what it says.
    cells, total = log[13].split(": ")[1].split("= ")
    sizes = [(int(n), int(kb)) for n, kb in re.findall(r"(\d+)\*(\d+)kB", cells)]
    assert sum(n * kb for n, kb in sizes) == int(total[:-2])


@pytest.mark.parametrize(
    ("gfp", "order"),
    [
        (GFP_KERNEL | __GFP_RETRY_MAYFAIL, 0),
        (GFP_KERNEL | 0x200000, 0),
        (GFP_KERNEL | 0x4, 0),
        (GFP_KERNEL, 4),
        (GFP_KERNEL | 0x10000, 0),
    ],
)
def test_who_may_fail_kills_nobody(m: Machine, gfp: int, order: int) -> None:
    a = task(m, "a", 50_000)
    a.fault(0, 50_000)
    with pytest.raises(OutOfMemory) as e:
        while True:
            m.alloc_pages(order, gfp)
    assert e.value.errno == errno.ENOMEM
    assert killed(m) == []
    assert a.nr_present == 50_000
    m.validate()


def test_who_must_not_use_files_waits_for_others_but_not_for_ever(m: Machine) -> None:
    a = task(m, "a", 50_000)
    a.fault(0, 50_000)
    use_up(m, NOFS)
    assert killed(m) == []
    m.validate()


def test_a_failed_request_is_logged_once_in_ten_seconds(m: Machine) -> None:
    use_up(m, GFP_KERNEL | __GFP_NOWARN)
    assert not any("allocation failure" in line for line in m.log)
    for _ in range(3):
        use_up(m)
    found = [line for line in m.log if "page allocation failure" in line]
    assert found == [
        "kmm: page allocation failure: order:0, mode:0xcc0(GFP_KERNEL), nodemask=(null),"
        "cpuset=/,mems_allowed=0"
    ]
    m.clock.advance(10_000_000_000)
    use_up(m)
    assert len([line for line in m.log if "page allocation failure" in line]) == 2


def test_who_must_not_fail_gets_what_is_kept_or_somebody_goes(m: Machine) -> None:
    a = task(m, "a", 1000)
    a.fault(0, 1000)
    with pytest.raises(KernelError):
        while True:
            m.alloc_pages(0, GFP_KERNEL | __GFP_RETRY_MAYFAIL)
    assert __alloc_pages(m, GFP_KERNEL | __GFP_NOFAIL, 0, 0) > 0
    assert killed(m) == ["a"]
    m.validate()
