"""Orders to fail: what they do, for how long, and what is said of wrong ones."""

from __future__ import annotations

import errno

import pytest

from kmm import ConfigError, KernelError, Machine, MachineConfig
from kmm.failure_orders import FailureOrders
from kmm.scenario import Player, check_scenario
from kmm.snapshot import dump

MEMORY = "/sys/devices/system/memory"


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
