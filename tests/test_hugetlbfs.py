"""Users of huge pages: what they reserve, touch and let go."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from kmm import KernelError
from kmm.hugetlbfs import HugetlbUser
from kmm.load import play_loads
from kmm.memory import User
from kmm.mempolicy import new_policy
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
