"""Users of huge pages: what they reserve, touch and let go."""

from __future__ import annotations

import errno
import re

import numpy as np
import pytest

from kmm import KernelError, Machine
from kmm.cpuset import CpuSet
from kmm.errors import InvalidArgument
from kmm.hugetlbfs import HugetlbUser
from kmm.load import play_loads
from kmm.memory import User
from kmm.mempolicy import new_policy
from kmm.oom_kill import oom_badness
from kmm.params import PG_RESERVED
from kmm.shrinker import Shrinker, do_shrink_slab, shrink_slab
from kmm.snapshot import differences, dump
from kmm.views import layers
from tests.conftest import DIMM, two_nodes
from tests.huge import GIB1, MIB2, counts, machine, set_pool


def test_a_page_is_reserved_until_it_is_touched_and_not_again() -> None:
    m = machine()
    h = m.default_hstate
    set_pool(m, 4)
    user = HugetlbUser(m, "file", 3, tokens=True)
    assert counts(h) == (4, 4, 3, 0)
    assert user.fault(0, 2) == 2
    assert user.fault(0, 3) == 1
    assert counts(h) == (4, 1, 0, 0)
    user.write_tokens(0, [5, 6, 7])
    assert user.release(1, 1) == 1
    assert counts(h) == (4, 2, 0, 0)
    assert user.read_tokens(0, 3).tolist() == [5, 0, 7]
    # The second touch takes what nobody has reserved.
    HugetlbUser(m, "other", 2)
    with pytest.raises(KernelError) as e:
        user.fault(1, 1)
    assert e.value.errno == errno.ENOSPC
    m.users["other"].close()
    assert user.fault(1, 1) == 1
    m.validate()
    assert user.shrink(1) == 1
    assert user.grow(1) == 1
    user.close()
    assert counts(h) == (4, 4, 0, 0)
    m.validate()


def test_the_nearest_node_that_may_give_gives() -> None:
    m = machine()
    set_pool(m, 4)
    near = HugetlbUser(m, "near", 3)
    near.fault(0, 3)
    first = m.page_zone(int(near.pfns()[0]))
    assert [m.page_zone(int(p)).nid for p in near.pfns()] == [0, 0, 1]
    assert first is not None
    bound = HugetlbUser(m, "bound", 1, policy=new_policy(m, "bind", [1]))
    bound.fault(0, 1)
    assert m.page_zone(int(bound.pfns()[0])).nid == 1
    m.validate()


def test_pages_of_a_pool_are_described_by_their_user() -> None:
    m = machine("kernel", GIB1)
    set_pool(m, 1, 1, 1 << 20)
    user = HugetlbUser(m, "big", 1, size=GIB1, policy=new_policy(m, "bind", [1]))
    user.fault(0, 1)
    pfn = int(user.pfns()[0])
    assert m.user_of(pfn + 200000) is user
    assert m.describe_page(pfn + 77) == "'big', page 0"
    m.validate()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: HugetlbUser(m, "", 1), "name: ''"),
        (lambda m: HugetlbUser(m, "a", -1), "pages: -1"),
        (lambda m: HugetlbUser(m, "a", 1, size=4096), "size: 4096; allowed: 1073741824, 2097152"),
        (lambda m: User(m, "a", "hugetlb", 1), "kind: 'hugetlb'"),
    ],
)
def test_bad_arguments_are_named(act, message: str) -> None:
    m = machine()
    with pytest.raises(KernelError, match=message) as e:
        act(m)
    assert e.value.errno == errno.EINVAL
    assert not m.users
    m.validate()


def test_loads() -> None:
    m = machine()
    load = {"kind": "hugetlb", "size": MIB2, "count": 6, "nodes": [1]}
    assert play_loads(m, load) == "hugepages-2048kB: 6 pages"
    user = {"kind": "hugetlb_user", "user": "a", "size": MIB2, "count": 5, "nodes": [1]}
    assert play_loads(m, {**user, "touch": 2}) == "a: 2 of 5 huge pages"
    assert counts(m.default_hstate) == (6, 4, 3, 0)
    assert play_loads(m, user) == "a: 5 of 5 huge pages"
    assert "ENOMEM" in play_loads(m, {**user, "user": "b"})
    assert play_loads(m, {**user, "free": True}) == "a: 5 pages freed"
    assert counts(m.default_hstate) == (6, 6, 0, 0)
    assert np.array_equal(list(m.users), [])
    m.validate()


def test_it_is_not_read_or_written_as_files_of_small_pages_are() -> None:
    m = machine()
    set_pool(m, 2)
    user = HugetlbUser(m, "file", 2)
    for access in (user.read, user.write):
        with pytest.raises(KernelError, match="kind: 'hugetlb'; allowed: anon, shmem, file") as e:
            access(0, 1)
        assert e.value.errno == errno.EINVAL
    assert user.nr_present == 0
    m.validate()


def crowded() -> Machine:
    """A machine whose pool somebody has a part of, beside a task and a file, with swap."""
    m = two_nodes("memhp_default_state=online_movable", swap=64 << 20)
    m.plug("a", 1, DIMM, 512 << 20)
    set_pool(m, 40)
    huge = HugetlbUser(m, "huge", 10, tokens=True)
    huge.fault(0, 5)
    huge.write_tokens(0, range(5))
    User(m, "task", "anon", 100).fault(0, 100)
    User(m, "log", "file", 100).write(0, 100)
    return m


def run_out_of_memory(m: Machine) -> None:
    hog = User(m, "hog", "anon", 2 * m.totalram_pages)
    with pytest.raises(KernelError) as e:
        hog.fault(0, hog.pages)
    assert e.value.errno == errno.ENOMEM


def offline_all(m: Machine) -> None:
    for block in (32, 33, 34, 35):
        m.write(f"/sys/devices/system/memory/memory{block}/state", "offline")


def join_and_leave_a_cpuset(m: Machine) -> None:
    CpuSet(m, "some", [1]).attach(m.users["huge"])
    m.users["huge"].fault(5, 5)
    nodes = [m.page_zone(int(p)).nid for p in m.users["huge"].pfns(5, 5)]
    assert nodes == [1] * 5


@pytest.mark.parametrize(
    "walk",
    [
        run_out_of_memory,
        offline_all,
        join_and_leave_a_cpuset,
        lambda m: m.write("/proc/sys/vm/drop_caches", "3"),
        lambda m: m.write("/proc/sys/vm/compact_memory", "1"),
        lambda m: m.sync(),
        lambda m: [shrink_slab(m, nid, 0) for nid in (0, 1)],
        lambda m: [m.explain_offline(block) for block in m.memory_blocks],
        lambda m: [m.offline_pages_report(block) for block in (32, 33)],
        dump,
        layers,
        lambda m: [m.read(f"/proc/{name}") for name in ("meminfo", "vmstat", "zoneinfo")],
    ],
)
def test_what_goes_through_all_users_takes_those_of_huge_pages_too(walk) -> None:
    m = crowded()
    before = counts(m.default_hstate)
    walk(m)
    m.validate()
    huge = m.users["huge"]
    assert huge.read_tokens(0, 5).tolist() == list(range(5))
    assert not huge.killed
    if walk is not join_and_leave_a_cpuset:
        assert counts(m.default_hstate)[2] == before[2] == 5
    huge.close()
    m.validate()


def test_they_and_the_pool_s_own_pages_have_all_that_users_have() -> None:
    m = crowded()
    names = {name for name in (*dir(User), *vars(m.users["task"])) if not name.startswith("__")}
    pool = m.default_hstate.pool
    assert pool is not None
    for user in (m.users["huge"], pool):
        for name in names:
            getattr(user, name)
        assert user.oom_score_adj == 0
        assert user.shrinker is None
        assert do_shrink_slab(m, user, 0) == 0
        # Huge pages of a pool are nobody's resident memory: their mappers are no better victims.
        assert oom_badness(m, user, m.totalram_pages) is None
        assert user.placement(0).nid == 0
    m.validate()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda u: setattr(u, "shrinker", Shrinker()), "shrinker: of huge pages; allowed: None"),
        (lambda u: u.wait_for_page(7), "'huge': of huge pages; allowed: fault"),
        (lambda u: u.fault(7, 1, PG_RESERVED), "flags: 0x1; allowed: marks out of"),
        (lambda u: setattr(u, "policy", "bind"), "policy: 'bind'"),
    ],
)
def test_what_a_pool_would_not_know_of_is_refused(act, message: str) -> None:
    m = crowded()
    before = dump(m)
    with pytest.raises(InvalidArgument, match=re.escape(message)):
        act(m.users["huge"])
    assert differences(before, dump(m)) == []
    m.validate()


def test_loads_do_not_take_one_kind_for_the_other() -> None:
    m = crowded()
    assert "user: 'huge', of huge pages" in play_loads(
        m, {"kind": "anon", "user": "huge", "pages": 10}
    )
    said = play_loads(m, {"kind": "hugetlb_user", "user": "task", "size": MIB2, "count": 10})
    assert "user: 'task'; allowed: a new one" in said
    assert (m.users["huge"].nr_present, m.users["task"].nr_present) == (5, 100)
    m.validate()
