"""What the load of a step does, and what is wrong with one that is not understood."""

from __future__ import annotations

from typing import Any

import pytest

from kmm import Machine
from kmm.errors import ConfigError
from kmm.load import mmu_gather_batches, play_loads, timeline
from kmm.memory import User
from kmm.mempolicy import new_policy
from kmm.scenario import Player, check_scenario
from kmm.schema import check_load
from tests.conftest import DIMM, two_nodes

HOG = {"kind": "anon", "user": "hog", "pages": 1000, "policy": "bind", "nodes": [1]}


def machine() -> Machine:
    m = two_nodes("memhp_default_state=online_movable")
    m.plug("a", 1, DIMM, 256 << 20)
    return m


def nodes_of(m: Machine, user: User) -> list[int]:
    zones = [m.page_zone(int(pfn)) for pfn in user.pfns()]
    return [zone.nid for zone in zones if zone is not None]


def test_loads_are_played_in_their_order() -> None:
    m = machine()
    said = play_loads(
        m,
        check_load(
            [
                HOG,
                {"kind": "shmem", "file": "f", "size": "4K", "count": 30, "nodes": [1]},
                {"kind": "anon", "user": "big", "size": "4M", "thp": True, "nodes": [1]},
                {"kind": "slab", "pages": 50, "nodes": [1]},
                {"kind": "anon", "user": "locked", "pages": 7, "lock": True},
                HOG | {"pages": 24},
                {"kind": "shmem", "file": "f", "free": True},
                {"kind": "anon", "user": "nobody", "free": True},
            ],
            "load",
        ),
    )
    assert said == (
        "hog: 1000 pages; f: 30 pages; big: 1024 pages; slab: 50 slabs; locked: 7 pages; "
        "hog: 1024 pages; f: 30 pages freed; nobody: not there"
    )
    assert set(nodes_of(m, m.users["hog"])) == set(nodes_of(m, m.users["big"])) == {1}
    assert m.memmap_engine.is_allocated(int(m.users["big"].pfns()[512]), 9)
    assert set(nodes_of(m, m.users["slab"])) == {0}  # node 1 has only movable memory
    assert m.users["locked"].engine.locked
    assert "f" not in m.users
    m.validate()


def test_what_the_kernel_refuses_is_said_and_the_rest_done() -> None:
    m = machine()
    said = play_loads(m, [HOG | {"user": "a", "nodes": [5]}, HOG | {"user": "b", "pages": 1 << 17}])
    first, second = said.split("; b: ")
    assert first.startswith("a: ")
    assert "nodes: 5; allowed: " in first
    assert second.startswith(f"{m.users['b'].nr_present} pages of 131072: ")
    assert "a" not in m.users
    m.validate()


def test_files_of_a_mount_begin_to_take_turns_with_another_node_each() -> None:
    m = machine()
    load = {"kind": "shmem", "pages": 4, "policy": "interleave", "nodes": [0, 1]}
    play_loads(m, [load | {"file": name} for name in ("f", "g")])
    assert nodes_of(m, m.users["f"]) == [0, 1, 0, 1]
    assert nodes_of(m, m.users["g"]) == [1, 0, 1, 0]
    m.validate()


A, B, F = {"kind": "anon", "user": "hog"}, {"kind": "anon", "user": "hog2"}, {"kind": "shmem"}


@pytest.mark.parametrize(
    ("line", "loads", "parts"),
    [
        ("hog 1 160 > /tmp/hog & sleep 4; cat /tmp/hog", [A], [A, 4.0]),
        ("sleep 2; hog 1 3 & sleep 4; hog2 1 3 &", [A, B], [2.0, A, 4.0, B]),
        ("cp /bin/hog /bin/hog2; hog2 1 3 & sleep 1.5", [B], [B, 1.5]),
        ("kill $(pidof hog); sleep 2", [A | {"free": True}], [A | {"free": True}, 2.0]),
        ("sleep 1; dd of=/mnt/t/f; sleep 2", [F | {"file": "f"}], [1.0, F | {"file": "f"}, 2.0]),
        ("sleep 1; fill; sleep 2", [F], [F, 1.0, 2.0]),
        ("sleep 3; ls", [], [3.0]),
        ("asleep 3; sleep x; nosleep 4", [], []),
    ],
)
def test_a_line_is_parted_into_loads_and_sleeps(line: str, loads: list, parts: list) -> None:
    assert timeline({"op": "sh", "line": line, "load": loads}) == parts


@pytest.mark.parametrize("before", [0, 76, 600])
def test_a_process_lets_go_of_what_the_kernel_gathers(before: int) -> None:
    sizes = list(mmu_gather_batches(20000, before))
    assert sum(sizes) == 20000
    assert max(sizes) == 510
    whole = [8, *[510] * 19] * 3
    gathered = [sum(whole[:i]) - before for i in range(1, len(whole))]
    edges = [sum(sizes[:i]) for i in range(1, len(sizes))]
    assert edges == [edge for edge in gathered if 0 < edge < 20000]


def test_what_ends_gives_its_pages_back_from_the_last_of_a_batch() -> None:
    """release_pages collects pages at the head of a list and frees that from its head."""
    m = machine()
    order: dict[str, list[int]] = {}
    for kind, group in (("shmem", 15), ("anon", 510), ("file", 15)):
        user = User(m, kind, kind, 600, policy=new_policy(m, "bind", [1]))
        user.fault(0, 600)
        pfns = [int(pfn) for pfn in user.pfns()]
        zone = m.page_zone(pfns[0])
        assert zone is not None
        zone.drain()
        user.release(0, 600)
        # The newest is at the head of the CPU's list of movable pages.
        got = zone.pcp_list(0, 1)[::-1]
        want = [p for i in range(0, 600, group) for p in pfns[i : i + group][::-1]]
        order[kind] = want
        assert got == want
        zone.drain()
    assert order["anon"] != order["shmem"]
    m.validate()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "anonymous"}, r"load.kind: 'anonymous'; allowed: anon, shmem, .*hugetlb"),
        ({"kind": None}, "load.kind: None; allowed: anon"),
        ({"pages": -1}, "load.pages: -1; allowed: a number from 0 to"),
        ({"pages": True}, "load.pages: True; allowed: a number"),
        ({"policy": "bound"}, "load.policy: 'bound'; allowed: default, bind, preferred, interl"),
        ({"nodes": 1}, "load.nodes: 1; allowed: a list of node numbers"),
        ({"nodes": [-1]}, r"load.nodes: \[-1\]; allowed: a list of node numbers"),
        ({"nodes": []}, r"load.nodes: \[\]; allowed: some, with policy 'bind'"),
        ({"policy": "default"}, r"load.nodes: \[1\]; allowed: none with policy 'default'"),
        ({"thp": "yes"}, "load.thp: 'yes'; allowed: true or false"),
        ({"kind": "hugetlb", "size": "3M"}, "load.size: 3145728; allowed: 2M, 1G"),
        ({"kind": "hugetlb", "size": "2M"}, "load.count: missing; allowed: a number"),
        ({"color": 1}, "load.color: 1; no such field; allowed: count, file, free, kind"),
        ({"user": 5}, "load.user: 5; allowed: text"),
    ],
)
def test_a_bad_load_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_load(HOG | change, "load")
    with pytest.raises(ConfigError, match=message.replace("load.", r"load\[1\]\.")):
        check_load([HOG, HOG | change], "load")
    scenario = {"steps": [{"op": "sh", "line": "x", "load": HOG | change}]}
    with pytest.raises(ConfigError, match="file: step 1." + message):
        check_scenario(scenario, "file")


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (5, "load: 5; allowed: an object with 'kind', or a list of such"),
        ([HOG, 5], r"load\[1\]: 5; allowed: an object with 'kind'"),
        ({"pages": 5}, "load.kind: missing; allowed: anon"),
        ({"kind": "anon"}, "load.pages: missing; allowed: .*, or size and count"),
    ],
)
def test_what_is_no_load_is_named(load: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_load(load, "load")


def test_of_a_recording_fields_that_are_not_known_are_passed_over() -> None:
    assert check_load(HOG | {"color": 1}, "load", others=True) == [HOG | {"color": 1}]


def test_a_scenario_shows_what_came_of_its_loads() -> None:
    scenario = check_scenario(
        {
            "machine": {"nodes": [{"cpus": "0", "memory": "1G"}, {}]},
            "steps": [
                {"op": "sh", "line": "hog 0 4 &", "load": HOG | {"nodes": [0]}},
                {"op": "sh", "line": "cat /tmp/hog"},
            ],
        },
        "file",
    )
    player = Player(scenario)
    assert [player.play(step).output for step in scenario.steps] == [
        "hog: 1000 pages",
        "skipped: changes nothing",
    ]
    player.m.validate()
