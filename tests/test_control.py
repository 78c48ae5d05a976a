"""The control directory without FUSE."""

from __future__ import annotations

import errno
import json
import os

import pytest

from kmm import KernelError
from kmm.control import Control, Pipe
from kmm.mount import player_of
from kmm.scenario import Player, check_scenario
from kmm.tree import Tree
from tests.conftest import two_nodes

CONTROL = "/.kmm"
STATE = "/sys/devices/system/memory/memory32/state"


@pytest.fixture
def control() -> Control:
    player = player_of(two_nodes())
    return Control(Tree(player.m), player)


def write(control: Control, name: str, text: str) -> int:
    return control.open(f"{CONTROL}/{name}", os.O_WRONLY).write(text.encode(), 0)


def read(control: Control, name: str) -> str:
    return control.open(f"{CONTROL}/{name}", os.O_RDONLY).read(1 << 20, 0).decode()


def refusal(control: Control, name: str, text: str) -> int:
    with pytest.raises(KernelError) as e:
        write(control, name, text)
    control.player.m.validate()
    return e.value.errno or 0


def test_plug_and_unplug(control: Control) -> None:
    write(control, "plug", "a 1 0x100000000 256M\n")
    assert "_OST 0x0\nuevent add /devices/system/memory/memory32" in read(control, "outcome")
    assert json.loads(read(control, "status"))["blocks"] == 10
    assert refusal(control, "plug", "a 1 0x100000000 256M") == errno.EBUSY
    assert "refused: " in read(control, "outcome")
    control.player.m.write(STATE, "online_movable")
    write(control, "unplug", "a")
    assert "_OST 0x0" in read(control, "outcome")
    assert refusal(control, "unplug", "a") == errno.EBUSY
    assert read(control, "validate") == "ok\n"


def test_an_ejection_that_fails_tells_the_writer(control: Control) -> None:
    write(control, "plug", "a 1 0x100000000 256M\n")
    control.player.m.write(STATE, "online_kernel")
    write(control, "step", '{"op": "alloc", "id": "x", "count": 100, "node": 1}')
    assert "100 of 100" in read(control, "outcome")
    assert refusal(control, "unplug", "a") == errno.EBUSY
    assert "_OST 0x82" in read(control, "outcome")
    assert "nothing" not in read(control, "outcome")


def test_the_outcome_is_that_of_the_last_write(control: Control) -> None:
    assert refusal(control, "plug", "a") == errno.EINVAL
    assert refusal(control, "next", "1") == errno.ENODATA
    assert "every step was played" in read(control, "outcome")
    assert "plug" not in read(control, "outcome")
    write(control, "plug", "a 1 0x100000000 256M")
    write(control, "fail", "busy 32")
    assert read(control, "outcome") == ""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plug", "a 1"),
        ("plug", "a x 0 1G"),
        ("plug", "a 1 here 1G"),
        ("plug", "a 1 0x100000000 9" + "9" * 30),
        ("unplug", ""),
        ("step", "{"),
        ("step", '{"op": "fly"}'),
        ("step", "[" * 100000),
        ("next", "many"),
        ("fail", "fail online_pages"),
        ("fail", "fail online_pages EWHAT"),
        ("fail", "fail printk EBUSY"),
        ("fail", "fail online_pages EBUSY 0"),
    ],
)
def test_what_is_not_understood_is_einval_and_said(control: Control, name: str, text: str) -> None:
    assert refusal(control, name, text) == errno.EINVAL
    assert "refused: " in read(control, "outcome")


def test_the_steps_of_a_scenario_are_played_when_asked_for() -> None:
    steps = [
        {"op": "plug", "id": "a", "node": 0, "addr": "4G", "size": "256M"},
        {"op": "write", "path": STATE, "value": "nonsense"},
        {"op": "write", "path": STATE, "value": "online"},
    ]
    player = Player(check_scenario({"steps": steps}, "here"))
    control = Control(Tree(player.m), player)
    assert read(control, "next").startswith("step 1: plug a: 256 MiB")
    write(control, "next", "1\n")
    assert read(control, "next").startswith("step 2: ")
    write(control, "next", "5")
    assert "refused: EINVAL" in read(control, "outcome")
    assert player.m.read(STATE) == "online\n"
    assert read(control, "next") == ""
    assert refusal(control, "next", "1") == errno.ENODATA


def test_a_failure_is_ordered_and_comes_once(control: Control) -> None:
    write(control, "plug", "a 1 0x100000000 256M")
    write(control, "fail", "fail online_pages ENOMEM 2")
    assert read(control, "fail") == "fail online_pages\n"
    write(control, "step", json.dumps({"op": "write", "path": STATE, "value": "online_movable"}))
    other = {"op": "write", "path": STATE.replace("32", "33"), "value": "online_movable"}
    assert refusal(control, "step", json.dumps(other)) == errno.ENOMEM
    assert read(control, "fail") == ""
    write(control, "step", json.dumps(other))
    control.player.m.validate()


def test_a_pipe_has_a_reader_wait_for_what_comes(control: Control) -> None:
    pipe = control.open(f"{CONTROL}/uevents_pipe", os.O_RDONLY)
    assert isinstance(pipe, Pipe)
    assert pipe.read(4096, 0) is None
    write(control, "plug", "a 1 0x100000000 128M")
    text = b"add /devices/system/memory/memory32 memory\nadd /devices/system/node/node1 node\n"
    assert pipe.read(4096, 0) == text
    assert pipe.read(4096, 0) is None
    late = control.open(f"{CONTROL}/uevents_pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert late.read(7, 0) == b"add /de"
    assert late.read(4096, 7) == text[7:]
    assert late.read(4096, 0) is None
    assert read(control, "uevents").encode() == text
    control.player.m.validate()


def test_what_opens_and_what_does_not(control: Control) -> None:
    for path, flags, code in (
        (CONTROL, os.O_RDONLY, errno.EISDIR),
        (f"{CONTROL}/what", os.O_RDONLY, errno.ENOENT),
        (f"{CONTROL}/plug", os.O_RDONLY, errno.EACCES),
        (f"{CONTROL}/kmsg", os.O_WRONLY, errno.EACCES),
    ):
        with pytest.raises(KernelError) as e:
            control.open(path, flags)
        assert e.value.errno == code, path
    names = [name for name, _ in control.listdir(CONTROL)]
    assert all(control.attr(f"{CONTROL}/{name}").mode & 0o600 for name in names)
