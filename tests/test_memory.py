"""What users of pages are asked for wrongly is refused, and changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kmm.errors import InvalidArgument
from kmm.hugetlbfs import HugetlbUser
from kmm.machine import Machine
from kmm.memory import User
from kmm.mempolicy import MemPolicy
from kmm.params import PG_DIRTY
from kmm.shrinker import Shrinker
from kmm.snapshot import dump
from kmm.vmstat import all_node_items
from tests.conftest import two_nodes

NO_NUMBERS: list[Any] = ["x", -1, 1.0, None, True, [1], 1 << 70, math.nan]


@pytest.fixture
def m() -> Machine:
    return two_nodes()


def with_tokens(m: Machine, kind: str = "anon") -> User:
    user = User(m, "u", kind, 20, tokens=True)
    user.write(0, 10)
    return user


@pytest.mark.parametrize(
    "policy",
    [
        "bind",
        None,
        ("bind", (1,)),
        MemPolicy("often"),
        MemPolicy("bind"),
        MemPolicy("interleave"),
        MemPolicy("bind", (77,)),
        MemPolicy("bind", (1,), "fixed"),
    ],
)
def test_a_policy_is_one_that_the_machine_can_follow(m: Machine, policy: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"policy.*: .*; allowed: "):
        User(m, "x", "anon", 10, policy=policy)
    with pytest.raises(InvalidArgument, match=r"policy.*: .*; allowed: "):
        HugetlbUser(m, "x", 0, policy=policy)
    assert not m.users
    user = User(m, "x", "anon", 10)
    with pytest.raises(InvalidArgument, match=r"policy.*: .*; allowed: "):
        user.policy = policy
    assert user.fault(0, 10) == 10
    m.validate()


CALLS: dict[str, tuple[str, Callable[[User, Any], object]]] = {
    "grow": ("n", lambda u, x: u.grow(x)),
    "shrink": ("n", lambda u, x: u.shrink(x)),
    "fault from": ("start", lambda u, x: u.fault(x, 1)),
    "fault": ("n", lambda u, x: u.fault(0, x)),
    "fault with": ("flags", lambda u, x: u.fault(0, 1, x)),
    "release from": ("start", lambda u, x: u.release(x, 1)),
    "release": ("n", lambda u, x: u.release(0, x)),
    "read from": ("start", lambda u, x: u.read(x, 1)),
    "read": ("n", lambda u, x: u.read(0, x)),
    "write from": ("start", lambda u, x: u.write(x, 1)),
    "write": ("n", lambda u, x: u.write(0, x)),
    "write_tokens from": ("start", lambda u, x: u.write_tokens(x, [1])),
    "write_tokens": ("tokens", lambda u, x: u.write_tokens(0, [1, x])),
    "read_tokens from": ("start", lambda u, x: u.read_tokens(x, 1)),
    "read_tokens": ("n", lambda u, x: u.read_tokens(0, x)),
    "pfns from": ("start", lambda u, x: u.pfns(x)),
    "pfns": ("n", lambda u, x: u.pfns(0, -1 if x is None else x)),
    "wait_for_page": ("start", lambda u, x: u.wait_for_page(x)),
}


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_number_is_refused(m: Machine, call: str, value: Any) -> None:
    user = with_tokens(m)
    argument, do = CALLS[call]
    before = dump(m)
    with pytest.raises(InvalidArgument, match=rf"{argument}: .*; allowed: a number from 0 to \d+"):
        do(user, value)
    assert dump(m) == before
    m.validate()


@pytest.mark.parametrize("number", [np.uint8, np.int64, np.uint64])
def test_numbers_of_numpy_are_numbers(m: Machine, number: Any) -> None:
    user = User(m, "u", "anon", 1000, tokens=True)
    assert user.fault(number(250), number(250)) == 250
    user.write_tokens(number(250), [number(7)] * 250)
    assert user.read_tokens(number(250), number(250)).tolist() == [7] * 250
    assert user.shrink(number(10)) == user.grow(number(10)) == 10
    m.validate()


@pytest.mark.parametrize(
    "tokens",
    [
        -1,
        7,
        None,
        "12",
        ["1", "2"],
        b"12",
        [1.0],
        [1, -1],
        [1 << 64],
        [[1, 2], [3, 4]],
        np.array(3),
        np.array([1.0, 2.0]),
        np.array([1, -2]),
        np.array([[1, 2]]),
        np.array([True]),
    ],
    ids=repr,
)
def test_tokens_are_whole_numbers_of_64_bits(m: Machine, tokens: Any) -> None:
    user = with_tokens(m)
    before = user.read_tokens(0, 20).tolist()
    with pytest.raises(InvalidArgument, match=r"tokens: .*; allowed: "):
        user.write_tokens(0, tokens)
    assert user.read_tokens(0, 20).tolist() == before
    user.write_tokens(0, range(1, 11))
    user.write_tokens(3, [(1 << 64) - 1, 1])
    assert user.read_tokens(2, 4).tolist() == [3, (1 << 64) - 1, 1, 6]
    m.validate()


def test_tokens_need_pages_that_carry_them(m: Machine) -> None:
    user = with_tokens(m)
    with pytest.raises(InvalidArgument, match="tokens: page 10 is absent; allowed: pages in mem"):
        user.write_tokens(8, [1, 2, 3, 4])
    assert not user.read_tokens(8, 2).any()
    with pytest.raises(InvalidArgument, match=r"n: 30; allowed: a number from 0 to 12"):
        user.write_tokens(8, [1] * 30)
    none = User(m, "none", "anon", 10)
    none.fault(0, 10)
    for call in (lambda: none.write_tokens(0, [1]), lambda: none.read_tokens(0, 1)):
        with pytest.raises(InvalidArgument, match="user 'none': tokens: False; allowed: True"):
            call()
    sown = User(m, "sown", "anon", 10, tokens=True)
    sown.engine.sow(3)
    sown.fault(0, 10)
    with pytest.raises(InvalidArgument, match="user 'sown': what its pages hold follows from a"):
        sown.write_tokens(0, [1])
    m.validate()


@pytest.mark.parametrize("value", [[1], {}, "x", "32", None, 1.0, True, -1, 1 << 70, 99], ids=repr)
def test_a_block_is_one_that_exists(m: Machine, value: Any) -> None:
    before = dump(m)
    for call in (m.explain_offline, m.offline_pages_report):
        with pytest.raises(InvalidArgument, match=r"block_id: .*; allowed: (a w|those that)"):
            call(value)
    assert dump(m) == before
    m.validate()


@pytest.mark.parametrize("kind", ["file", "shmem"])
def test_what_is_there_does_not_become_mapped(m: Machine, kind: str) -> None:
    user = User(m, "u", kind, 10)
    user.fault(0, 10)
    with pytest.raises(InvalidArgument, match="mapped: True; allowed: False while 10 pages are"):
        user.engine.mapped = True
    user.engine.mapped = False
    m.validate()
    user.release(0, 10)
    user.engine.mapped = True
    user.fault(0, 10)
    assert all_node_items(m)["nr_mapped"] == 10
    with pytest.raises(InvalidArgument, match="mapped: False; allowed: True while 10 pages are"):
        user.engine.mapped = False
    m.validate()


def test_what_the_engine_trusts_is_not_written_to(m: Machine) -> None:
    user = User(m, "u", "file", 10, tokens=True)
    user.engine.sow(3)
    for nr_slots in (10, 20):
        user.engine.resize(nr_slots)
        user.write(0, 10)
        for table in (user.engine.slots, user.engine.store, user.engine.written):
            assert table is not None
            with pytest.raises(ValueError, match="read-only"):
                table[0] = 1
    m.validate()


CLOSED: dict[str, Callable[[User], object]] = {
    "fault": lambda u: u.fault(0, 0),
    "grow": lambda u: u.grow(0),
    "shrink": lambda u: u.shrink(0),
    "release": lambda u: u.release(0, 0),
    "read": lambda u: u.read(0, 0),
    "write": lambda u: u.write(0, 0),
    "close": lambda u: u.close(),
    "pfns": lambda u: u.pfns(),
    "write_tokens": lambda u: u.write_tokens(0, []),
    "read_tokens": lambda u: u.read_tokens(0, 0),
    "wait_for_page": lambda u: u.wait_for_page(0),
    "shrinker": lambda u: setattr(u, "shrinker", Shrinker()),
    "pin": lambda u: u.m.pin(u, 0),
}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("call", CLOSED)
def test_who_is_closed_does_nothing_any_more(m: Machine, call: str, again: bool) -> None:
    user = with_tokens(m)
    user.close()
    if again:  # somebody else has the name
        with_tokens(m)
    before = dump(m)
    with pytest.raises(InvalidArgument, match="user 'u': is closed; allowed: one that is not"):
        CLOSED[call](user)
    assert dump(m) == before
    assert not m.shrinkers
    m.validate()


@pytest.mark.parametrize("mode", ["default", "interleave"])
@pytest.mark.parametrize("thp", ["never", "always"])
def test_a_clean_page_that_comes_dirty_is_written(m: Machine, mode: str, thp: str) -> None:
    policy = MemPolicy(mode, (0, 1) if mode == "interleave" else ())
    user = User(m, "f", "file", 2000, policy=policy, tokens=True, thp=thp)
    user.engine.sow(9)
    user.fault(0, 1500)
    assert user.engine.nr_dirty == 0
    assert not user.read_tokens(0, 1500).any()
    assert user.fault(600, 1400, PG_DIRTY) == 500
    if thp == "never":
        assert user.engine.nr_dirty == 1400
        assert not user.read_tokens(0, 600).any()
    items = all_node_items(m)
    assert items["nr_dirty"] == items["nr_dirtied"] == user.engine.nr_dirty >= 1400
    assert user.read_tokens(600, 1400).all()
    m.sync()
    assert user.fault(600, 1400, PG_DIRTY) == 0
    assert user.engine.nr_dirty >= 1400
    m.validate()


@pytest.mark.parametrize("at", [0, 65_535, 65_536, 99_999])
def test_the_last_slot_is_found_wherever_it_is(m: Machine, at: int) -> None:
    user = User(m, "wide", "anon", 100_000)
    assert user.last_slot() == -1
    user.fault(at, 1)
    assert user.last_slot() == at
    user.shrink(at + 1)
    assert user.last_slot() == -1
    m.validate()
