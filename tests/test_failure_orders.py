"""Orders to fail: what they do, for how long, and what is said of wrong ones."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kmm import ConfigError, KernelError, Machine, MachineConfig
from kmm.cli import main
from kmm.control import Control
from kmm.failure_orders import FailureOrders
from kmm.scenario import Player, check_scenario, load_scenario
from kmm.snapshot import dump
from kmm.tree import Tree

MEMORY = "/sys/devices/system/memory"
EXAMPLE = Path(__file__).parent.parent / "examples" / "failures.toml"


@pytest.fixture
def m() -> Machine:
    config = {"memory": "1G", "maxmem": "16G", "nodes": [{"cpus": "0", "memory": "1G"}, {}]}
    m = Machine(MachineConfig.from_dict(config))
    m.plug("dimm1", 1, 0x100000000, 512 << 20)
    m.write(f"{MEMORY}/memory32/state", "online_movable")
    m.write(f"{MEMORY}/memory33/state", "online_movable")
    return m


def offline(m: Machine, block: int, state: str = "offline") -> int | None:
    try:
        m.write(f"{MEMORY}/memory{block}/state", state)
    except KernelError as e:
        return e.errno
    return None


def test_a_busy_block_stays_until_the_orders_are_forgotten(m: Machine) -> None:
    orders = FailureOrders(m)
    orders.busy(33)
    assert not m.explain_offline(33).can_go
    assert [offline(m, 33), offline(m, 33), offline(m, 32)] == [errno.EBUSY, errno.EBUSY, None]
    assert m.read(f"{MEMORY}/memory33/state") == "online\n"
    orders.forget()
    assert offline(m, 33) is None
    m.validate()


def test_a_notifier_refuses_one_block_or_all(m: Machine) -> None:
    orders = FailureOrders(m)
    orders.order("veto MEM_GOING_ONLINE ENOMEM memory34")
    assert offline(m, 34, "online") == errno.ENOMEM
    assert offline(m, 35, "online") is None
    orders.order("veto MEM_GOING_OFFLINE EIO")
    assert [offline(m, block) for block in (32, 33, 35)] == [errno.EIO] * 3
    assert orders.pending() == ["veto MEM_GOING_ONLINE ENOMEM 34", "veto MEM_GOING_OFFLINE EIO"]
    orders.order("forget")
    assert orders.pending() == []
    assert offline(m, 32) is None
    m.validate()


def test_an_add_fails_half_way_once_and_leaves_nothing(m: Machine) -> None:
    before = m.sections["flags"].tolist()
    orders = FailureOrders(m)
    orders.order("fail sparse_add_section ENOMEM 3")
    m.plug("dimm2", 1, 0x120000000, 512 << 20)
    assert not [name for name in m.listdir(MEMORY) if name in ("memory36", "memory37")]
    m.unplug("dimm2")
    assert m.sections["flags"].tolist() == before
    assert m.plug("dimm3", 1, 0x120000000, 512 << 20) == 0
    assert m.read(f"{MEMORY}/memory36/state") == "offline\n"
    m.validate()


def test_orders_outlast_the_steps_of_a_scenario_and_their_traces() -> None:
    data = {"machine": {"memory": "1G"}, "steps": []}
    player = Player(check_scenario(data, "s"))
    FailureOrders(player.m).fail("offline_pages", errno.EINTR, 2)
    step = {"op": "write", "path": f"{MEMORY}/memory3/state", "value": "offline"}
    online = step | {"value": "online"}
    assert player.play(step, trace=True).error == ""
    assert player.play(online).error == ""
    assert player.play(step, trace=True).error.startswith("EINTR")
    assert player.play(step).error == ""
    player.m.validate()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "order: ''; allowed: busy BLOCK"),
        ("busy", "allowed: busy BLOCK"),
        ("busy x", "BLOCK: 'x'; allowed: a number"),
        ("busy -1", "BLOCK: '-1'"),
        ("busy 999", "block_id: 999; allowed: those of blocks that are there"),
        ("veto MEM_ONLINE EIO", "event: 'MEM_ONLINE'; allowed: MEM_GOING_ONLINE"),
        ("veto MEM_GOING_ONLINE nothing", "ERRNO: 'nothing'; allowed: names"),
        ("veto MEM_GOING_ONLINE Exx", "ERRNO: 'Exx'"),
        ("fail grow_zone_span ENOMEM", "function: 'grow_zone_span'; allowed: "),
        ("fail __add_pages ENOMEM 0", "nth: 0; allowed: 1 to"),
        ("fail __add_pages ENOMEM 2 3", "allowed: busy BLOCK"),
    ],
)
def test_wrong_orders_are_one_clear_sentence(m: Machine, line: str, said: str) -> None:
    before = dump(m)
    with pytest.raises(ConfigError, match="allowed") as e:
        FailureOrders(m).order(line)
    assert said in str(e.value)
    assert dump(m) == before
    m.validate()


# -- the steps of scenarios ---------------------------------------------------------------------


@pytest.mark.parametrize("trace", [False, True, "timed"])
def test_the_example_fails_where_it_is_told_to_and_nowhere_else(trace: bool | str) -> None:
    player = Player(load_scenario(EXAMPLE))
    outcomes = [player.play(step, trace) for step in player.scenario.steps]
    refused = {i: out.errno for i, out in enumerate(outcomes, 1) if out.errno}
    assert refused == {7: errno.ENOMEM, 9: errno.EBUSY}
    said = {i: out.output for i, out in enumerate(outcomes, 1) if out.output}
    vetoes = "veto MEM_GOING_ONLINE ENOMEM 33, veto MEM_GOING_OFFLINE EBUSY 32"
    assert said == {
        1: "ordered: fail sparse_add_section",
        2: "_OST 0x0",
        3: "_OST 0x0",
        4: "_OST 0x0",
        5: "ordered: veto MEM_GOING_ONLINE ENOMEM 33",
        8: f"ordered: {vetoes}",
        10: "_OST 0x82",
        11: f"withdrawn: {vetoes}",
        13: "_OST 0x0",
    }
    assert outcomes[1].log[-1].endswith("acpi_memory_enable_device() error")
    assert not any("add /devices" in line for line in outcomes[1].uevents)
    assert sum("add /devices" in line for line in outcomes[3].uevents) == 5
    assert player.m.kprobes is None or not player.m.kprobes.recording
    player.m.validate()


def test_every_command_that_plays_shows_the_orders(tmp_path: Path) -> None:
    def kmm(*words: str, status: int = 0) -> str:
        out = CliRunner().invoke(main, list(words))
        assert out.exit_code == status, out.output
        return out.output

    saved = str(tmp_path / "run.json")
    shown = kmm("run", str(EXAMPLE), "--save", saved)
    assert "step 1: fail sparse_add_section ENOMEM 3\n    ordered: " in shown
    assert "step 8: busy 32\n    ordered: " in shown
    assert "step 11: forget\n    withdrawn: " in shown
    steps = json.loads(kmm("run", str(EXAMPLE), "--json"))["steps"]
    assert [steps[i]["text"] for i in (4, 7)] == ["veto MEM_GOING_ONLINE ENOMEM 33", "busy 32"]
    run = json.loads(Path(saved).read_text())
    assert [step["text"] for step in run["steps"]][7:] == [s["text"] for s in steps[7:]]
    page = tmp_path / "report.html"
    kmm("report", str(EXAMPLE), "-o", str(page))
    assert "fail sparse_add_section ENOMEM 3" in page.read_text()
    assert "veto MEM_GOING_ONLINE ENOMEM 33" in kmm("trace", str(EXAMPLE))
    why = ("why", "32", "--scenario", str(EXAMPLE), "--steps")
    assert "ordered failure" in kmm(*why, "8", status=1)
    kmm(*why, "11")


def test_orders_of_steps_and_of_the_control_file_are_the_same() -> None:
    player = Player(load_scenario(EXAMPLE))
    control = Control(Tree(player.m), player)
    control.open("/.kmm/next", os.O_WRONLY).write(b"8", 0)
    assert control.open("/.kmm/fail", os.O_RDONLY).read(999, 0).decode().splitlines() == [
        "veto MEM_GOING_ONLINE ENOMEM 33",
        "veto MEM_GOING_OFFLINE EBUSY 32",
    ]
    control.open("/.kmm/fail", os.O_WRONLY).write(b"forget", 0)
    assert player.play({"op": "forget"}).output == "nothing was ordered"
    assert player.m.explain_offline(32).can_go
    player.m.validate()


def test_a_block_that_is_not_there_is_refused_by_its_step() -> None:
    steps = [{"op": "busy", "block": 999}, {"op": "forget"}]
    player = Player(check_scenario({"machine": {"memory": "1G"}, "steps": steps}, "s"))
    first, second = (player.play(step) for step in player.scenario.steps)
    assert first.error == "ENODEV (No such device): block: 999; it is not there"
    assert (first.errno, second.output) == (errno.ENODEV, "nothing was ordered")
    player.m.validate()


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"op": "busy"}, "step 1.block: missing; allowed: a number from 0 to "),
        ({"op": "busy", "block": -1}, "step 1.block: -1; allowed: a number from 0 to "),
        ({"op": "busy", "block": "33"}, "step 1.block: '33'; allowed: a number from 0 to "),
        ({"op": "busy", "block": True}, "step 1.block: True; allowed: a number"),
        (
            {"op": "veto", "event": "MEM_ONLINE", "errno": "EIO"},
            "step 1.event: 'MEM_ONLINE'; allowed: MEM_GOING_ONLINE, MEM_GOING_OFFLINE",
        ),
        (
            {"op": "veto", "event": "MEM_GOING_ONLINE", "errno": 12},
            "step 1.errno: 12; allowed: the name of an errno, such as EBUSY",
        ),
        ({"op": "veto", "event": "MEM_GOING_ONLINE"}, "step 1.errno: missing; allowed: the name"),
        (
            {"op": "fail", "function": "grow_zone_span", "errno": "EIO"},
            "step 1.function: 'grow_zone_span'; allowed: __add_memory, __add_pages, ",
        ),
        (
            {"op": "fail", "function": "__add_pages", "errno": "Exx"},
            "step 1.errno: 'Exx'; allowed: the name of an errno",
        ),
        (
            {"op": "fail", "function": "__add_pages", "errno": "EIO", "nth": 0},
            "step 1.nth: 0; allowed: a number from 1 to 1073741824",
        ),
        ({"op": "forget", "block": 3}, "step 1.block: 3; no such field; allowed: "),
    ],
)
def test_wrong_steps_are_one_clear_sentence(step: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as e:
        check_scenario({"machine": {"memory": "1G"}, "steps": [step]}, "s")
    assert said in str(e.value)
