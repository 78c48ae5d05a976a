"""Huge pages in scenarios: what pools and those who map their pages do, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest

from kmm.errors import ConfigError
from kmm.hugetlbfs import HugetlbUser
from kmm.scenario import check_scenario, describe
from tests.huge import counts
from tests.test_workload import MACHINE, played, step, user

MIB2 = 2 << 20


def pool(**fields: Any) -> dict[str, Any]:
    return {"op": "hugetlb", **fields}


def huge(id: str, **fields: Any) -> dict[str, Any]:
    return user(id, kind="hugetlb", **fields)


def test_a_pool_has_its_size_by_node() -> None:
    player, outcomes = played(
        pool(count=6),
        pool(count=10, nodes=[1]),
        pool(count=2, nodes=[0, 1]),
        pool(count=0),
    )
    assert [o.output for o in outcomes] == [
        "hugepages-2048kB: 6 pages (3 on node 0, 3 on node 1), 6 free, 0 reserved, 0 surplus",
        "hugepages-2048kB: 13 pages (3 on node 0, 10 on node 1), 13 free, 0 reserved, 0 surplus",
        "hugepages-2048kB: 4 pages (2 on node 0, 2 on node 1), 4 free, 0 reserved, 0 surplus",
        "hugepages-2048kB: 0 pages (none), 0 free, 0 reserved, 0 surplus",
    ]
    assert [o.text for o in outcomes[:2]] == ["hugetlb count=6", "hugetlb count=10 nodes=[1]"]
    assert player.m.users == {}


def test_a_pool_gets_no_more_than_memory_has() -> None:
    player, outcomes = played(pool(count=1000))
    have = player.m.default_hstate.nr_huge_pages
    assert 150 < have < 256
    assert outcomes[0].output.startswith(f"hugepages-2048kB: {have} pages")
    assert player.m.read("/proc/sys/vm/nr_hugepages") == f"{have}\n"


def test_pages_are_reserved_touched_and_freed() -> None:
    player, outcomes = played(
        pool(count=10),
        huge("a", size=8 * MIB2, tokens=True),
        step("touch", "a", size=3 * MIB2, seed=1),
    )
    m, a = player.m, player.m.users["a"]
    assert isinstance(a, HugetlbUser)
    assert outcomes[1].output == "1 of kind hugetlb, up to 8 huge pages of 2048 kB each"
    assert outcomes[2].output == "a: 3 of 3 touched, 3 of them came"
    assert counts(m.default_hstate) == (10, 7, 5, 0)
    assert (a.read_tokens(0, 8) != 0).sum() == 3
    said = [
        player.play(s).output
        for s in (
            step("grow", "a"),
            step("shrink", "a", size=MIB2),
            step("truncate", "a", first=0),
            step("close", "a"),
        )
    ]
    assert re.match(r"a: (\d) of \1 came$", said[0])
    assert said[1].startswith("a: 1 page went, ")
    assert said[2].endswith(" went, 0 are left")
    assert "a" not in m.users
    assert counts(m.default_hstate) == (10, 10, 0, 0)
    m.validate()


def test_surplus_pages_come_on_demand_and_go_when_they_are_freed() -> None:
    player, outcomes = played(
        pool(count=2, overcommit=3),
        huge("a", size=5 * MIB2),
        huge("b", size=MIB2),
        huge("c", size=MIB2, reserve=False),
        step("grow", "a"),
        step("grow", "c"),
        pool(count=0),
    )
    said = [o.output or o.error for o in outcomes]
    assert said[2].startswith("ENOMEM")
    assert said[3].startswith("1 of kind")
    assert said[4] == "a: 5 of 5 came"
    assert said[5].startswith("c: 0 of 1 came: ENOSPC")
    assert said[6].endswith("0 free, 0 reserved, 5 surplus")
    assert counts(player.m.default_hstate) == (5, 0, 0, 5)
    player.play(step("close", "a"))
    assert counts(player.m.default_hstate) == (0, 0, 0, 0)
    player.m.validate()


def test_what_is_not_reserved_may_be_missing() -> None:
    player, outcomes = played(
        pool(count=3),
        huge("a", size=5 * MIB2, reserve=False),
        step("touch", "a"),
    )
    assert outcomes[2].output.startswith("a: 3 of 5 touched, 3 of them came: ENOSPC")
    assert counts(player.m.default_hstate) == (3, 0, 0, 0)


def test_pages_of_one_gib_come_from_a_pool_of_their_own() -> None:
    player, outcomes = played(
        {"op": "plug", "id": "d", "node": 1, "addr": "4G", "size": "1G"},
        pool(page_size="1G", count=1, nodes=[1]),
        huge("big", page_size="1G", size="1G", nodes=[1]),
        step("grow", "big"),
        pool(page_size="1G", count=0),
        maxmem="8G",
        cmdline="memhp_default_state=online_kernel",
    )
    said = [o.output for o in outcomes[1:]]
    assert said[0].startswith("hugepages-1048576kB: 1 page (1 on node 1), 1 free")
    assert said[1] == "1 of kind hugetlb, up to 1 huge page of 1048576 kB each"
    assert said[2] == "big: 1 of 1 came"
    assert said[3].endswith("0 free, 0 reserved, 1 surplus")
    assert player.m.default_hstate.nr_huge_pages == 0


def test_policies_and_cpusets_say_which_node_gives() -> None:
    player, _ = played(
        pool(count=4, nodes=[0, 1]),
        step("cpuset", "some", nodes=[1]),
        huge("a", size=2 * MIB2, cpuset="some"),
        huge("b", size=4 * MIB2, policy="interleave", nodes=[0, 1], reserve=False),
        step("grow", "a"),
        step("grow", "b"),
    )
    m = player.m
    nodes = {n: [m.page_zone(int(p)).nid for p in m.users[n].pfns()] for n in ("a", "b")}
    assert nodes == {"a": [1, 1], "b": [0, 1, 0, 1]}


def test_of_many_that_do_not_fit_none_is_made() -> None:
    player, outcomes = played(pool(count=5), huge("w", count=3, size=2 * MIB2))
    assert outcomes[1].error.startswith("ENOMEM")
    assert player.m.users == {}
    assert counts(player.m.default_hstate) == (5, 5, 0, 0)


def test_a_node_that_is_not_there_has_no_pool() -> None:
    player, outcomes = played(
        pool(count=4, nodes=[0, 2], overcommit=9),
        maxmem="4G",
        nodes=[{"cpus": "0-1", "memory": "256M"}, {"memory": "256M"}, {}],
    )
    assert outcomes[0].error.startswith("ENOENT")
    assert "nodes: 2; allowed: 0, 1" in outcomes[0].error
    assert counts(player.m.default_hstate) == (0, 0, 0, 0)
    assert player.m.default_hstate.nr_overcommit_huge_pages == 0


def test_its_pages_move_with_their_tokens_when_their_block_goes() -> None:
    state = "/sys/devices/system/memory/memory32/state"
    player, outcomes = played(
        {"op": "plug", "id": "d", "node": 1, "addr": "4G", "size": "128M"},
        {"op": "write", "path": state, "value": "online_movable"},
        pool(count=100, nodes=[1]),
        huge("a", size=100 * MIB2, tokens=True, nodes=[1]),
        step("grow", "a"),
        pool(count=60, nodes=[0]),
        {"op": "write", "path": state, "value": "offline"},
        memory="512M",
        maxmem="8G",
    )
    assert [o.error for o in outcomes] == [""] * 7
    a = player.m.users["a"]
    assert a.nr_present == 100
    assert not (a.pfns() >= 4 << 18).any()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([pool()], "step 1.count: missing; allowed: one of count and overcommit"),
        ([pool(count=-1)], "step 1.count: -1; allowed: a number from 0 to"),
        ([pool(count="4")], "step 1.count: '4'; allowed: a number"),
        ([pool(count=1, page_size="4M")], "step 1.page_size: 4194304; allowed: 2M, 1G"),
        ([pool(count=1, page_size=True)], "step 1.page_size: True"),
        ([pool(overcommit=1, nodes=[0])], r"step 1.nodes: \[0\]; allowed: with a count"),
        ([pool(count=1, nodes=[9])], "step 1.nodes: 9; allowed: 0 to 1"),
        ([pool(overcommit=1, page_size="1G")], "step 1.overcommit: 1; allowed: with pages of 2M"),
        ([pool(count=1, size="2M")], "step 1.size: '2M'; no such field; allowed: .*page_size"),
        ([huge("a", size="1M")], "step 1.size: 1048576; allowed: from 2097152 bytes on"),
        ([huge("a", pages=511)], "step 1.pages: 511; allowed: from 512 on"),
        ([huge("a", size="2M", page_size="1G")], "step 1.size: 2097152; allowed: from 1073741824"),
        ([huge("a", size="2M"), step("grow", "a", pages=3)], "step 2.pages: 3; allowed: from 512"),
        ([huge("a", size="2M", order=9)], "step 1.order: 9; allowed: 0 for kind 'hugetlb'"),
        ([huge("a", size="2M", thp="always")], "step 1.thp: 'always'; allowed: 'never'"),
        ([huge("a", size="2M", lock=True)], "step 1.lock: True; allowed: false"),
        ([huge("a", size="2M", reserve=1)], "step 1.reserve: 1; allowed: true or false"),
        ([user("a", pages=1, reserve=True)], "step 1.reserve: True; allowed: with kind 'hugetlb'"),
        ([user("a", pages=1, page_size="2M")], "step 1.page_size: 2097152; allowed: with kind"),
        ([huge("a", size="2M"), step("fread", "a")], "step 2.id: 'a', of kind hugetlb; allowed"),
        ([huge("a", size="2M"), step("churn", "a")], "step 2.id: 'a', of kind hugetlb; allowed"),
        ([huge("a", size="2M"), step("pin", "a")], "step 2.id: 'a', of kind hugetlb; allowed"),
    ],
)
def test_bad_steps_are_named(steps: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_scenario({"machine": MACHINE, "steps": steps}, "file")


def test_a_machine_without_pages_of_one_gib_has_no_pool_of_them() -> None:
    for one in (pool(count=1, page_size="1G"), huge("a", size="1G", page_size="1G")):
        with pytest.raises(ConfigError, match=r"step 1.page_size: .*; allowed: 2M, the machine"):
            check_scenario({"machine": MACHINE | {"pdpe1gb": False}, "steps": [one]}, "file")


def test_a_step_is_told_in_one_line() -> None:
    assert describe(pool(count=3, overcommit=2)) == "hugetlb count=3 overcommit=2"
