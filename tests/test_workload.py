"""Workload steps: what they do, that they do it again, and what they refuse."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from kmm import workload
from kmm._workload import touch_slots
from kmm.errors import ConfigError
from kmm.mempolicy import ALL_NODES
from kmm.params import PAGEBLOCK_NR_PAGES, PG_DIRTY, USER_SLAB_RECLAIMABLE
from kmm.scenario import Outcome, Player, check_scenario
from kmm.vmstat import all_vm_events, node_items

MACHINE = {
    "memory": "512M",
    "cpus": 2,
    "nodes": [{"cpus": "0-1", "memory": "256M"}, {"memory": "256M"}],
    "seed": 3,
}


def played(*steps: dict[str, Any], **machine: Any) -> tuple[Player, list[Outcome]]:
    """Play steps; the machine holds afterwards."""
    scenario = check_scenario({"machine": MACHINE | machine, "steps": list(steps)}, "file")
    player = Player(scenario)
    outcomes = [player.play(step) for step in scenario.steps]
    player.m.validate()
    return player, outcomes


def user(id: str, **more: Any) -> dict[str, Any]:
    return {"op": "user", "id": id, **more}


def step(op: str, id: str, **more: Any) -> dict[str, Any]:
    return {"op": op, "id": id, **more}


def test_users_grow_and_shrink_by_pages_bytes_and_shares() -> None:
    player, outcomes = played(
        user("a", pages=1000),
        step("grow", "a", pages=300),
        step("grow", "a", size="400K"),
        step("shrink", "a", pages=50),
        step("grow", "a"),
        step("shrink", "a", pages=5000),
        user("b", share=0.5, nodes=[1]),
        step("grow", "b", share=0.25),
    )
    said = [o.output for o in outcomes]
    assert said[1:6] == [
        "a: 300 of 300 came",
        "a: 100 of 100 came",
        "a: 50 pages went, 350 are left",
        "a: 650 of 650 came",
        "a: 1000 pages went, 0 are left",
    ]
    m = player.m
    managed = sum(z.managed_pages for z in m.nodes[1].zones)
    b = m.users["b"]
    assert (b.pages, b.nr_present) == (managed // 2, managed // 4)
    assert node_items(m, m.nodes[1])["nr_anon_pages"] == managed // 4


def test_an_id_may_stand_for_many_users() -> None:
    player, outcomes = played(
        user("w", count=3, pages=100, nodes=[1], policy="preferred"),
        step("grow", "w", pages=10),
    )
    assert outcomes[1].output == "w.1: 10 of 10 came; w.2: 10 of 10 came; w.3: 10 of 10 came"
    assert [player.m.users[f"w.{i}"].policy.nodes for i in (1, 2, 3)] == [(1,)] * 3


def test_touching_is_random_but_the_same_each_time() -> None:
    steps = [user("a", pages=4096), step("touch", "a", pages=1000, seed=5)]
    first, _ = played(*steps)
    again, _ = played(*steps)
    assert (first.m.users["a"].pfns() == again.m.users["a"].pfns()).all()
    assert first.m.users["a"].nr_present == 1000
    for other in (
        played(steps[0], step("touch", "a", pages=1000, seed=6)),
        played(*steps, seed=4),
    ):
        there = first.m.users["a"].pfns() >= 0
        assert ((other[0].m.users["a"].pfns() >= 0) != there).any()
    # Pages come in the order in which they are touched, not in that of their indices.
    present = [int(p) for p in first.m.users["a"].pfns() if p >= 0]
    assert present != sorted(present)


def test_touching_what_is_there_brings_no_page() -> None:
    player, outcomes = played(
        user("a", pages=500), step("grow", "a"), step("touch", "a", pages=200)
    )
    assert outcomes[2].output == "a: 200 of 200 touched, 0 of them came"
    slots = player.m.users["a"].engine.slots
    assert np.count_nonzero(slots >> np.uint64(60) & np.uint64(1)) == 500  # young, as all that came


def test_touching_takes_turns_and_huge_pages_stay_whole() -> None:
    player, _ = played(
        user("a", pages=600, policy="interleave", nodes=[0, 1]),
        step("touch", "a", pages=600),
        user("h", pages=1024, thp="always"),
        step("grow", "h"),
        step("touch", "h", pages=100),
    )
    m = player.m
    nids = [m.page_zone(int(p)).nid for p in m.users["a"].pfns()]  # type: ignore[union-attr]
    assert nids == [0, 1] * 300
    assert m.memmap_engine.is_allocated(int(m.users["h"].pfns()[PAGEBLOCK_NR_PAGES]), 9)


def test_slabs_churn_and_every_block_is_accounted_for() -> None:
    player, outcomes = played(
        user("s", kind="slab_reclaimable", order=2, pages=4000),
        step("churn", "s", pages=40000, seed=1),
        step("churn", "s", pages=40000, seed=2),
    )
    s = player.m.users["s"]
    assert s.kind == USER_SLAB_RECLAIMABLE
    assert s.pages == 1000
    came = went = 0
    for o in outcomes[1:]:
        words = o.output.replace(",", "").split()
        assert words[1:4] == ["10000", "of", "10000"]
        came, went = came + int(words[6]), went + int(words[8])
    assert came - went == s.nr_present
    assert 300 < s.nr_present < 700
    m = player.m
    assert sum(node_items(m, p)["nr_slab_reclaimable"] for p in m.nodes.values()) == 4 * (
        s.nr_present
    ) + sum(p.vmstat.get("nr_slab_reclaimable", 0) for p in m.nodes.values())


def test_files_are_written_read_and_cut() -> None:
    player, outcomes = played(
        user("f", kind="file", pages=1000),
        step("fwrite", "f", pages=100, first=50),
        step("fread", "f", pages=200),
        step("truncate", "f", first=120),
        step("fwrite", "f", first=990, pages=50),
    )
    said = [o.output for o in outcomes]
    assert said[1:] == [
        "f: 100 of 100 pages came",
        "f: 100 of 200 pages came",
        "f: 80 pages went, 120 are left",
        "f: 10 of 10 pages came",
    ]
    m, pfns = player.m, player.m.users["f"].pfns()
    assert m.memmap["flags"][pfns[60]] & PG_DIRTY
    assert not m.memmap["flags"][pfns[10]] & PG_DIRTY
    assert node_items(m, m.nodes[0])["nr_dirty"] == 80


def test_what_is_closed_gives_everything_back() -> None:
    before, _ = played()
    player, outcomes = played(
        user("a", pages=5000, lock=True),
        step("grow", "a"),
        user("s", kind="slab", order=3, pages=800),
        step("grow", "s"),
        step("close", "s"),
        step("close", "a"),
    )
    assert [o.output for o in outcomes[4:]] == ["s: 800 pages went", "a: 5000 pages went"]
    free = [sum(z.nr_free_pages + z.pcp_pages() for z in p.m.all_zones()) for p in (before, player)]
    assert free[0] == free[1]
    assert not player.m.users


def test_what_is_held_does_not_leave_its_block_until_it_is_let_go() -> None:
    offline = {"op": "write", "path": "/sys/devices/system/memory/memory32/state"}
    offline["value"] = "offline"
    player, outcomes = played(
        {"op": "plug", "id": "d", "node": 2, "addr": "4G", "size": "128M"},
        user("a", pages=1000, nodes=[2]),
        step("grow", "a"),
        step("pin", "a", first=10, pages=3, long=False),
        offline,
        step("unpin", "a"),
        offline,
        nodes=[*MACHINE["nodes"], {}],  # type: ignore[misc]
        cmdline="memhp_default_state=online_movable",
    )
    assert outcomes[3].output == "a: 3 pages held"
    assert "held" in outcomes[4].error
    assert outcomes[5].output == "a: 3 holds let go"
    assert not outcomes[6].error
    assert (player.m.users["a"].pfns() < 1 << 20).all()


def test_tasks_of_a_cpuset_get_its_nodes_only() -> None:
    player, outcomes = played(
        step("cpuset", "batch", nodes=[1]),
        step("cpuset", "below", nodes=[], parent="batch"),
        user("a", pages=100, cpuset="below"),
        step("grow", "a", pages=50),
        step("cpuset", "batch", nodes=[0]),
        step("grow", "a", pages=50),
    )
    assert [outcomes[i].output for i in (0, 1, 4)] == ["nodes 1", "nodes 1", "nodes 0"]
    m = player.m
    nids = [m.page_zone(int(p)).nid for p in m.users["a"].pfns()]  # type: ignore[union-attr]
    assert nids == [1] * 50 + [0] * 50


def test_what_does_not_fit_is_said_and_what_fits_stays() -> None:
    player, outcomes = played(user("a", share=1.0), step("grow", "a"), step("shrink", "a"))
    assert re.match(r"a: (\d+) of \d+ came; \1 went, as it was killed: ENOMEM", outcomes[1].output)
    assert player.m.users["a"].nr_present == 0


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([user("a")], "step 1.pages: missing; allowed: one of pages, size and share"),
        ([user("a", pages=1, share=0.5)], "step 1.share: 0.5; allowed: one of pages, size and"),
        ([user("a", share=0)], "step 1.share: 0; allowed: a part of the memory"),
        ([user("a", share=1.5)], "step 1.share: 1.5; allowed: a part of the memory"),
        ([user("a", share="1")], "step 1.share: '1'; allowed: a part of the memory"),
        ([user("a", pages=1, kind="heap")], "step 1.kind: 'heap'; allowed: anon, shmem, file"),
        ([user("a", pages=1, thp=True)], "step 1.thp: True; allowed: never, always, madvise"),
        ([user("a", pages=1, count=0)], "step 1.count: 0; allowed: a number from 1 to 10000"),
        ([user("a", pages=1, nodes=[7])], "step 1.nodes: 7; allowed: 0 to 1"),
        ([user("a", pages=1, cpuset="x")], "step 1.cpuset: 'x'; allowed: a cpuset before it"),
        ([step("cpuset", "a", nodes=[0], parent="x")], "step 1.parent: 'x'; allowed: a cpuset"),
        ([step("cpuset", "a")], "step 1.nodes: missing; allowed: a list of node numbers"),
        ([step("grow", "a")], "step 1.id: 'a'; allowed: the id of a user before it"),
        ([user("a", pages=1)] * 2, "step 2.id: 'a'; allowed: one that is not in use"),
        ([user("a", pages=1), step("close", "a"), step("grow", "a")], "step 3.id: 'a'; allowed"),
        ([user("a", pages=1), step("churn", "a", seed=-1)], "step 2.seed: -1; allowed"),
        ([user("", pages=1)], "step 1.id: ''; allowed: text that is not empty"),
        ([step("cpuset", "", nodes=[0])], "step 1.id: ''; allowed: text that is not empty"),
        ([user("a", pages=1, cpu=2)], "step 1.cpu: 2; allowed: 0 to 1$"),
        ([user("a", pages=1, policy="bind")], "step 1.nodes: .*; allowed: some, with policy 'b"),
        ([user("a", pages=1, policy="interleave", nodes=[])], "step 1.nodes: .*; allowed: some"),
        ([user("a", pages=1, policy="default", nodes=[0])], "step 1.nodes: .0.; allowed: none"),
        ([user("a", pages=8, order=3)], "step 1.order: 3; allowed: 0 for kind 'anon'"),
        ([user("a", pages=8, kind="driver_movable", order=1)], "step 1.order: 1; allowed: 0 for"),
        ([user("a", pages=8, kind="slab", thp="always")], "step 1.thp: 'always'; allowed: 'never'"),
        ([user("a", pages=8, kind="slab", lock=True)], "step 1.lock: True; allowed: false for k"),
        ([user("a", size=4095)], "step 1.size: 4095; allowed: from 4096 bytes on, a page"),
        ([user("a", pages=7, kind="slab", order=3)], "step 1.pages: 7; allowed: from 8 on, a blo"),
        ([user("a", size="16K", kind="slab", order=3)], "step 1.size: 16384; allowed: from 32768"),
        ([user("a", size="64K", kind="slab", order=3), step("grow", "a", pages=4)], "step 2.pages"),
        ([user("a", pages=1), step("churn", "a")], "step 2.id: 'a', of kind anon; allowed: a user"),
        ([user("a", pages=1), step("fwrite", "a")], "step 2.id: 'a', of .*: a user of kind shmem"),
        ([user("a", pages=1, kind="slab"), step("fread", "a")], "step 2.id: 'a', of kind slab;"),
        ([user("a", pages=1, kind="slab"), step("truncate", "a")], "step 2.id: 'a', of kind slab"),
        ([user("a", pages=1, kind="stack"), step("pin", "a")], "step 2.id: 'a', of kind stack; a"),
        ([step("balloon", "b", pages=1), step("touch", "b")], "step 2.op: 'touch'; allowed: grow"),
        ([user("a", pages=1, cpuset="x")], "allowed: a cpuset before it; there is none$"),
        ([step("grow", "a")], "allowed: the id of a user before it; there is none$"),
        (
            [user("a", pages=1, count=2), user("a.2", pages=1)],
            "step 2.id: 'a.2'; allowed: one that",
        ),
    ],
)
def test_bad_steps_are_named(steps: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_scenario({"machine": MACHINE, "steps": steps}, "file")


def test_what_the_machine_refuses_is_an_error_of_the_step() -> None:
    player, outcomes = played(
        user("a", pages=1, nodes=[2]),
        step("grow", "a"),
        user("b", pages=100),
        nodes=[*MACHINE["nodes"], {}],  # type: ignore[misc]
    )
    assert "nodes: " in outcomes[0].error
    assert outcomes[1].output == "nothing to do: its user was refused, or is closed"
    assert list(player.m.users) == ["b"]


def test_a_closed_id_is_free_again() -> None:
    player, outcomes = played(
        user("a", pages=10, count=2),
        step("close", "a"),
        user("a.1", kind="slab", pages=10),
        step("churn", "a.1"),
    )
    assert not any(o.error for o in outcomes)
    assert list(player.m.users) == ["a.1"]


def test_what_comes_from_swap_is_counted_and_what_goes_there_is_said() -> None:
    player, outcomes = played(
        user("a", pages=100000),
        step("grow", "a"),
        user("b", pages=60000),
        step("grow", "b"),
        step("touch", "a"),
        step("grow", "a"),
        swap="1G",
    )
    assert outcomes[5].output == "a: 0 of 0 came"
    a, said = player.m.users["a"], outcomes[4].output
    words = re.fullmatch(
        r"a: 100000 of 100000 touched, (\d+) of them came; (\d+) went, "
        r"(\d+) are on the swap device",
        said,
    )
    assert words, said
    came, went, swapped = map(int, words.groups())
    # What was swapped out before came back; what went since then is there, or came again.
    assert came > 10000
    assert swapped == a.engine.nr_swapped == a.pages - a.nr_present
    assert went >= swapped
    assert came == all_vm_events(player.m)["pswpin"]


def test_slots_are_looked_at_when_their_turn_comes() -> None:
    player, _ = played(user("a", pages=4000))
    m, a = player.m, player.m.users["a"]
    slots = np.arange(4000, dtype=np.int64)
    slots[3999] = 4000
    nid = a.placement(0).nid
    # Whoever has to wait for each of them comes back as often: the rest is not looked at again.
    assert touch_slots(a.engine, m, slots, a.gfp, nid, 0, a.cpu) == 0
    with pytest.raises(ValueError, match="slots 4000"):
        touch_slots(a.engine, m, slots, a.gfp, nid, ALL_NODES, a.cpu)
    assert 3000 < a.nr_present < 4000
    m.validate()


def test_who_is_killed_touches_nothing_any_more() -> None:
    player, outcomes = played(
        user("a", pages=1000),
        step("grow", "a", pages=500),
        user("big", share=1.0),
        step("touch", "big"),
        step("touch", "big"),
        step("grow", "big"),
        user("i", pages=10, policy="interleave", nodes=[0, 1]),
        step("touch", "i"),
    )
    assert player.m.users["big"].killed
    assert player.m.users["big"].nr_present == 0
    first = re.match(
        r"big: (\d+) of \d+ touched, (\d+) of them came; (\d+) went", outcomes[3].output
    )
    assert first
    done, came, went = map(int, first.groups())
    assert done == came == went > 90000
    assert "was killed" in outcomes[3].output
    for outcome in outcomes[4:6]:
        assert re.match(r"big: 0 of \d+ (touched, 0 of them )?came: ENOMEM", outcome.output)
        assert "was killed" in outcome.output
    assert outcomes[7].output == "i: 10 of 10 touched, 10 of them came"


def test_a_churn_is_drawn_in_parts_and_they_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [user("s", kind="slab", pages=1000), step("churn", "s", pages=9999, seed=1)]
    whole, said = played(*steps)
    monkeypatch.setattr(workload, "_CHURNED_AT_ONCE", 1000)
    parts, said_too = played(*steps)
    assert said[1].output == said_too[1].output
    assert said[1].output.startswith("s: 9999 of 9999 turned over")
    assert (whole.m.users["s"].pfns() == parts.m.users["s"].pfns()).all()


def test_a_churn_of_more_than_there_is_ends_where_memory_does() -> None:
    _, outcomes = played(
        user("s", kind="slab", share=1.0, count=2),
        step("grow", "s"),
        user("t", kind="slab", pages=100000),
        step("churn", "t", pages=17179869184),
    )
    assert re.match(r"t: \d+ of 17179869184 turned over", outcomes[3].output)


def test_a_host_without_memory_is_an_error_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(workload, "touch", fail)
    _, outcomes = played(user("a", pages=10), step("touch", "a"))
    assert outcomes[1].error.startswith("ENOMEM")
    assert "touch 'a': this host has not enough memory" in outcomes[1].error
