"""The stress test: it repeats itself, all adds up, and what does not is found and replayed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from kmm._tokens import wrong_token
from kmm.cli import main
from kmm.errors import ConfigError, KernelError, ValidationError
from kmm.memory import User, seed_of
from kmm.params import SLOT_PFN, SLOT_PRESENT, SLOT_SWAPPED, USER_ANON, USER_FILE, GiB, MiB
from kmm.scenario import Outcome, Player, check_scenario, load_scenario
from kmm.snapshot import differences, dump
from kmm.stress import Stress
from kmm.stress_steps import SORTS
from kmm.vmstat import all_vm_events
from kmm.workload import Workload
from tests.reference.tokens import wrong_token as slow_wrong_token
from tests.tampering import writable


def kmm(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture(scope="module")
def ran() -> Stress:
    run = Stress(seed=4, size=8 * GiB, used=2 * GiB)
    assert run.run(300) is None
    return run


def test_a_short_run_of_all_sorts_adds_up(ran: Stress) -> None:
    assert ran.operations == 300
    names = {u.name.rstrip("0123456789") for u in ran.player.m.users.values()}
    assert names >= set(SORTS)
    ops = {step["op"] for step in ran.steps}
    assert ops >= set("plug unplug write user balloon grow touch churn fwrite fread pin".split())
    ran.player.m.validate()


def test_all_users_have_what_they_wrote(ran: Stress) -> None:
    m = ran.player.m
    for user in m.users.values():
        if user.engine.written is not None:
            assert slow_wrong_token(m, user.engine, seed_of(user.name)) is None
            assert wrong_token(user.engine) is None
    some = sum(int(u.engine.written.sum()) for u in m.users.values() if u.engine.tokens)  # type: ignore[union-attr]
    assert some > 100_000


def test_the_seed_repeats_a_run_and_another_does_not(ran: Stress) -> None:
    again, other = (Stress(seed, 8 * GiB, 2 * GiB) for seed in (4, 6))
    assert again.run(300) is None
    assert other.run(0) is None
    assert again.steps == ran.steps
    assert not differences(dump(ran.player.m), dump(again.player.m))
    assert other.steps[40:200] != ran.steps[40:200]


def test_its_steps_played_as_a_scenario_come_to_the_same(ran: Stress, tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    path.write_text(json.dumps(ran.as_scenario("all of it")))
    player = Player(load_scenario(path))
    for step in player.scenario.steps:
        player.play(step)
    assert not differences(dump(ran.player.m), dump(player.m))


def test_memory_that_runs_short_goes_to_the_swap_device_and_tokens_with_it() -> None:
    run = Stress(seed=1, size=4 * GiB, used=1536 * MiB)
    assert run.run(500, 500) is None
    events = all_vm_events(run.player.m)
    assert min(events[name] for name in ("pswpout", "pswpin", "pgmigrate_success")) > 0


@pytest.mark.parametrize("seed", range(4))
def test_programs_are_killed_for_memory_and_all_adds_up(seed: int) -> None:
    run = Stress(seed, size=4 * GiB, used=GiB)
    assert run.run(300, 50) is None
    m = run.player.m
    killed = [line for line in m.log if line.startswith("Out of memory: Killed process")]
    assert len(killed) >= 1
    assert all_vm_events(m)["oom_kill"] >= len(killed)
    assert any("constraint=CONSTRAINT_MEMORY_POLICY" in line for line in m.log)
    # Whoever was killed has gone, and with it what it had on the swap device.
    closed = [step["id"] for step in run.steps if step["op"] == "close"]
    for line in killed:
        name = line.split("(")[1].split(")")[0]
        assert any(user[:15] == name for user in closed)
    m.validate()


@pytest.mark.parametrize("lock", [False, True])
def test_a_program_that_starves_is_killed_where_it_is_bound(lock: bool) -> None:
    run = Stress(seed=2, size=4 * GiB, used=GiB)
    assert run.run(0) is None
    step = run.source._starve()
    step["lock"] = lock
    m, before = run.player.m, all_vm_events(run.player.m)
    run._play(step)
    run._play(run.source.next())
    assert run.steps[-1]["op"] == "grow"
    assert all_vm_events(m)["oom_kill"] > before["oom_kill"]
    m.validate()
    while any(users[0].killed for users in run.player.workload.groups.values()):
        step = run.source.next()
        assert step["op"] == "close"
        run._play(step)
    # What it meant to do after that is left out, unless another was killed in its place.
    for _ in range(3):
        step = run.source.next()
        if step["op"] in ("grow", "touch", "close"):
            assert step["id"] in run.player.workload.groups
        run._play(step)
    m.validate()


# -- what is wrong is found ---------------------------------------------------------------


def lose_token(player: Player) -> None:
    """Change what a page in memory holds."""
    user = next(u for u in player.m.users.values() if u.kind == USER_ANON and u.nr_present > 0)
    pfn = int(user.pfns()[user.pfns() >= 0][-1])
    player.m.records.page_tokens[pfn] ^= np.uint64(1 << 17)


def lose_record(player: Player) -> None:
    """Let a slot name another page."""
    user = next(u for u in player.m.users.values() if u.kind == USER_ANON and u.nr_present > 0)
    at = int(np.flatnonzero(user.pfns() >= 0)[-1])
    writable(user.engine.slots)[at] ^= np.uint64(1)


def stop_somewhere(player: Player) -> None:
    """Be a fault of the program."""
    raise ZeroDivisionError("of the test")


def tampered(monkeypatch: pytest.MonkeyPatch, tamper: Any) -> None:
    """Let the 250th step of a player go wrong."""
    played = {}
    act = Player._act

    def wrong(self: Player, step: Mapping[str, Any]) -> str:
        played[id(self)] = played.get(id(self), 0) + 1
        out = act(self, step)
        if played[id(self)] == 250:
            tamper(self)
        return out

    monkeypatch.setattr(Player, "_act", wrong)


@pytest.mark.parametrize(
    ("tamper", "message"),
    [(lose_token, "was written"), (lose_record, "its record names another user or index")],
)
def test_a_failure_is_said_in_a_line_and_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tamper: Any, message: str
) -> None:
    tampered(monkeypatch, tamper)
    path = tmp_path / "failed.json"
    args = ("stress", "--seed", 3, "--size", "4G", "--operations", 200, "--every", 1, "-o", path)
    out = kmm(*args)
    assert out.exit_code == 1
    (line,) = out.output.strip().split("\n")
    assert message in line
    assert line.startswith("Error: operation ")
    assert line.endswith(f"kmm run {path} plays it")
    assert "Traceback" not in out.output
    data = json.loads(path.read_text())
    assert set(data) == {"title", "machine", "steps"}
    assert len(data["steps"]) >= 250
    monkeypatch.undo()
    tampered(monkeypatch, tamper)
    again = kmm("run", path, "--quiet")
    assert again.exit_code == 1
    found = line.split("ValidationError: ")[1].split(";")[0]
    assert found in again.output


def test_a_fault_of_the_program_is_a_failure_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tampered(monkeypatch, stop_somewhere)
    path = tmp_path / "failed.json"
    out = kmm("stress", "--size", "4G", "-o", path)
    assert out.exit_code == 1
    assert "ZeroDivisionError: of the test" in out.output
    assert len(json.loads(path.read_text())["steps"]) == 250


def test_what_the_machine_refuses_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Workload, user: User, step: Mapping[str, Any]) -> str:
        raise KernelError("of the test", code=16)

    monkeypatch.setattr(Workload, "_pin", refuse)
    run = Stress(seed=3, size=4 * GiB, used=GiB)
    assert run.run(100) is None
    assert run.refused > 0


def user_with_tokens(kind: str, pages: int = 2000, **more: Any) -> tuple[Player, User]:
    step = {"op": "user", "id": "u", "kind": kind, "pages": pages, "tokens": True, **more}
    machine = {"memory": "256M", "swap": "64M"}
    player = Player(check_scenario({"machine": machine, "steps": [step]}, "file"))
    played: Outcome = player.play(player.scenario.steps[0])
    assert not played.error
    return player, player.m.users["u"]


def finds(user: User, at: int) -> None:
    """The slow way and the engine find the same, and so does validate."""
    wrong = wrong_token(user.engine)
    assert wrong == slow_wrong_token(user.m, user.engine, seed_of(user.name))
    assert wrong is not None
    assert wrong[0] == at
    with pytest.raises(ValidationError, match=f"'u': slot {at}: holds the token"):
        user.m.validate()


@pytest.mark.parametrize(("kind", "order"), [("anon", 0), ("slab", 3), ("kernel", 10)])
def test_each_page_of_a_block_counts(kind: str, order: int) -> None:
    _, user = user_with_tokens(kind, pages=4096, order=order)
    user.fault(1, 3)
    user.m.validate()
    pfn = int(user.pfns()[2])
    user.m.records.page_tokens[pfn + (1 << order) - 1] = 0
    finds(user, 2)


def test_tokens_of_huge_pages_count() -> None:
    _, user = user_with_tokens("anon", thp="always")
    user.fault(0, 1024)
    user.release(700, 10)
    user.m.validate()
    user.m.records.page_tokens[int(user.pfns()[1000])] = 5
    finds(user, 1000)


def test_what_is_on_the_swap_device_counts() -> None:
    player, user = user_with_tokens("anon", pages=70000)
    user.fault(0, sum(z.nr_free_pages for z in player.m.all_zones()) + 3000)
    slots = user.engine.slots
    at = int(np.flatnonzero(slots & np.uint64(SLOT_SWAPPED))[0])
    user.m.validate()
    assert player.m.swap is not None
    player.m.swap.device.tokens[int(slots[at]) & SLOT_PFN] = 0
    finds(user, at)


def test_what_a_file_wrote_is_not_lost_when_it_is_dropped() -> None:
    player, user = user_with_tokens("file")
    player.play({"op": "fwrite", "id": "u", "pages": 100, "first": 50})
    player.play({"op": "fread", "id": "u", "pages": 200})
    m = player.m
    assert (user.read_tokens(0, 50) == 0).all()
    m.sync()
    m.write("/proc/sys/vm/drop_caches", "1\n")
    assert user.nr_present == 0
    m.validate()
    player.play({"op": "fread", "id": "u"})
    assert (user.read_tokens(50, 100) != 0).all()
    m.validate()
    m.write("/proc/sys/vm/drop_caches", "1\n")
    assert user.engine.store is not None
    writable(user.engine.store)[60] = 0
    assert user.kind == USER_FILE
    finds(user, 60)


def test_a_page_that_vanishes_is_missed() -> None:
    _, user = user_with_tokens("shmem")
    user.fault(0, 10)
    slot = int(user.engine.slots[4])
    assert slot & SLOT_PRESENT
    writable(user.engine.slots)[4] = 0
    wrong = wrong_token(user.engine)
    assert wrong is not None
    assert wrong[:2] == (4, 0)
    writable(user.engine.slots)[4] = slot
    user.m.validate()


def test_what_is_let_go_is_not_missed() -> None:
    player, user = user_with_tokens("file")
    player.play({"op": "fwrite", "id": "u", "pages": 100})
    player.play({"op": "truncate", "id": "u", "first": 30})
    player.play({"op": "fread", "id": "u", "pages": 60})
    assert (user.read_tokens(30, 30) == 0).all()
    user.m.validate()


def test_tokens_that_follow_from_a_seed_are_not_written_over() -> None:
    _, user = user_with_tokens("anon")
    user.fault(0, 10)
    with pytest.raises(KernelError, match="follows from a seed"):
        user.write_tokens(0, np.ones(1, dtype=np.uint64))
    with pytest.raises(ValueError, match="sow: seed 7"):
        user.engine.sow(7)
    user.m.validate()


def test_balloons_inflate_deflate_and_do_nothing_else() -> None:
    steps: list[dict[str, Any]] = [
        {"op": "balloon", "id": "b", "pages": 1000},
        {"op": "grow", "id": "b", "pages": 600},
        {"op": "shrink", "id": "b", "pages": 100},
        {"op": "close", "id": "b"},
    ]
    touch = {"op": "touch", "id": "b", "pages": 1}
    with pytest.raises(ConfigError, match=r"step 4\.op: 'touch'; allowed: grow, shrink, close"):
        check_scenario({"machine": {}, "steps": [*steps[:3], touch]}, "file")
    player = Player(check_scenario({"machine": {}, "steps": steps}, "file"))
    m = player.m
    before = m.totalram_pages
    said = []
    for step in player.scenario.steps:
        out = player.play(step)
        said.append(out.error or out.output)
        m.validate()
        if len(said) == 3:
            assert m.totalram_pages == before - 500
    assert said[:3] == [
        "a balloon of up to 1000 pages",
        "b: 600 of 600 came",
        "b: 100 pages went, 500 are left",
    ]
    assert m.totalram_pages == before
    assert not m.balloons
    assert "b" not in m.users


# -- the command ----------------------------------------------------------------------------


def test_the_command_says_that_all_adds_up() -> None:
    out = kmm("stress", "--size", "4G", "--operations", 50)
    assert out.exit_code == 0
    assert out.output.startswith("50 operations, ")
    assert out.output.strip().endswith("all adds up")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--size", "5G"), "size: 5368709120; allowed: multiples of 4G, from 4G to 16T"),
        (("--size", "x"), "--size: 'x'"),
        (("--used", "7G"), "used: 7516192768; allowed: from 64M to half of the size"),
        (("--every", "0"), "--every"),
        (("--seed", "-1"), "--seed"),
    ],
)
def test_mistakes_are_named(args: tuple[str, ...], message: str) -> None:
    out = kmm("stress", *args)
    assert out.exit_code == 2
    assert message in out.output
    with pytest.raises(ConfigError, match="size: 1; allowed"):
        Stress(0, 1, 1)


def test_a_file_that_cannot_be_written_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    tampered(monkeypatch, stop_somewhere)
    out = kmm("stress", "--size", "4G", "-o", "/nonexistent/file.json")
    assert out.exit_code == 2
    assert "/nonexistent/file.json: No such file or directory" in out.output


def test_it_can_be_interrupted() -> None:
    code = "from kmm.cli import main; main()"
    command = [sys.executable, "-c", code, "stress", "--operations", "10000000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(4)
        os.kill(process.pid, signal.SIGINT)
        assert process.stderr is not None
        _, said = process.communicate(timeout=5)
    assert process.returncode == 130
    assert said.startswith("Error: interrupted after operation ")
    assert "of 10000000, in " in said
    assert "Traceback" not in said
