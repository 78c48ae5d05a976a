"""What an offline tells of each page, when somebody asks."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kmm import KernelError, Machine
from kmm.memory import User
from kmm.mempolicy import new_policy
from kmm.offline_report import FATES, OfflineReport
from kmm.params import PG_DIRTY
from tests.conftest import DIMM, two_nodes

BLOCK = 128 << 20
PFN = DIMM >> 12
STATE = "/sys/devices/system/memory/memory32/state"


def machine(blocks: int = 1, kind: str = "movable") -> Machine:
    m = two_nodes(f"memhp_default_state=online_{kind}")
    m.plug("a", 1, DIMM, blocks * BLOCK)
    return m


def user(m: Machine, name: str, kind: str, pages: int, flags: int = 0, **more: str) -> User:
    made = User(m, name, kind, pages, policy=new_policy(m, "bind", [1]), **more)
    made.fault(0, pages, flags)
    return made


def test_every_page_of_the_block_has_its_line() -> None:
    m = machine()
    made = [user(m, "a", "anon", 700), user(m, "f", "file", 300, PG_DIRTY)]
    huge = user(m, "t", "anon", 1024, thp="madvise")
    where = {u.name: u.pfns() for u in (*made, huge)}
    report = m.offline_pages_report(32)
    assert report.error is None
    assert report.counts() == {"free": 32768 - 2024, "migrated": 2024}
    told: dict[str, dict[int, tuple[int, int | None]]] = {"a": {}, "f": {}, "t": {}}
    for page in report.pages():
        assert page.user is not None
        assert page.fate == "migrated"
        told[page.user][page.index] = (page.pfn, page.to)
    for u in (*made, huge):
        now = u.pfns()
        want = {i: (int(where[u.name][i]), int(now[i])) for i in range(u.pages)}
        assert told[u.name] == want
    m.validate()


def test_parts_of_a_huge_page_that_was_split_are_told_one_by_one() -> None:
    m = machine()
    huge = user(m, "t", "anon", 512, thp="madvise")
    filler = User(m, "filler", "shmem", m.totalram_pages, policy=new_policy(m, "bind", [0]))
    with pytest.raises(KernelError):
        filler.fault(0, filler.pages)
    for order in (10, 9):
        m.alloc_pages_bulk(1000, order, 0x20CC0, 0)
    for i in range(0, 40000, 2):
        filler.release(i, 1)
    report = m.offline_pages_report(32)
    assert report.counts() == {"free": 32768 - 512, "migrated": 512}
    assert (report.to == huge.pfns()).all()
    m.validate()


def test_what_lets_its_pages_go_meanwhile() -> None:
    m = machine()
    a, b = user(m, "a", "anon", 100), user(m, "b", "anon", 50)
    f = user(m, "clean", "file", 10)
    d = user(m, "dirty", "file", 10, PG_DIRTY)
    pin = m.pin(a, 50, long_term=False)

    def happens() -> None:
        m.unpin(pin)
        b.close()
        f.release(0, 10)
        d.release(0, 10)

    m.clock.call_after(1000, happens)
    report = m.offline_pages_report(32)
    assert report.error is None
    # All but the pinned one had moved before that.
    assert report.counts()["migrated"] == 100
    assert report.counts()["freed"] == 50
    assert report.counts()["dropped"] == 10
    assert report.counts()["written back"] == 10
    m.validate()


def test_a_refusal_says_what_stopped_it() -> None:
    m = machine(kind="kernel")
    anon = user(m, "a", "anon", 10)
    slab = user(m, "s", "slab", 1)
    report = m.offline_pages_report(32)
    assert report.blocked == int(slab.pfns()[0])
    assert report.errno == 16
    assert report.counts() == {"free": 32768 - 11, "stays": 11}
    assert "page dumped because: unmovable page" in report.log
    assert report.debug_line() == (
        "memory offlining [mem 0x100000000-0x107ffffff] failed due to failure to isolate range"
    )
    plain = json.loads(json.dumps(report.as_dict()))
    assert plain["reason"] == "failure to isolate range"
    assert {p["user"] for p in plain["pages"]} == {"a", "s"}
    assert all(p["fate"] in FATES for p in plain["pages"])
    assert (anon.pfns() >= PFN).all()
    m.validate()


def test_a_report_that_is_set_keeps_every_attempt() -> None:
    m = machine(2)
    made = user(m, "a", "anon", 10)
    m.offline_report = report = OfflineReport(m)
    pin = m.pin(made, 0, long_term=False)
    block = pin.pfn // 32768
    path = STATE.replace("32", str(block))
    with pytest.raises(KernelError):
        m.write(path, "offline")
    m.unpin(pin)
    m.write(path, "offline")
    m.unplug("a")
    assert [a.errno for a in report.attempts] == [4, 0, 0]
    assert report.attempts[0].counts()["stays"] == 1
    assert report.attempts[2].counts() == {"free": 32768}
    m.offline_report = None
    m.validate()


def test_without_one_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError

    m = machine()
    user(m, "a", "anon", 10)
    monkeypatch.setattr("kmm.offline_report.pages_in_use", never)
    m.write(STATE, "offline")
    m.validate()


def test_larger_blocks_of_a_user_are_told_page_by_page() -> None:
    m = machine(kind="kernel")
    made = User(m, "s", "slab", 2, order=3, policy=new_policy(m, "bind", [1]))
    made.fault(0, 2)
    report = m.offline_pages_report(32)
    first = np.repeat(np.sort(made.pfns()), 8) + np.tile(np.arange(8), 2)
    assert (report.pfns == first).all()
    assert (report.to == first).all()
    m.validate()
