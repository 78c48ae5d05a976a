"""The command line: outcomes, exit codes, and mistakes without tracebacks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from kmm.cli import COMMANDS, main
from kmm.cli_frame import Group
from kmm.scenario import Player, check_scenario
from tests.conftest import RECORDINGS

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.toml"))
(FIRST_DIMM,) = (path for path in EXAMPLES if path.stem == "first_dimm")


def kmm(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def test_demo_tells_the_story_of_a_dimm() -> None:
    out = kmm("demo")
    assert out.exit_code == 0
    assert "uevent online /devices/system/memory/memory32 memory" in out.output
    assert "_OST 0x82" in out.output
    assert "uevent remove /devices/system/node/node1 node" in out.output
    assert "the machine now" in out.output


def test_demo_is_a_word_wherever_a_scenario_is_taken(tmp_path: Path) -> None:
    assert kmm("run", "demo").output == kmm("demo").output
    assert "online_pages()" in kmm("trace", "demo").output
    out = kmm("export", tmp_path / "tree", "--scenario", "demo", "--steps", "1")
    assert out.exit_code == 0, out.output
    assert (tmp_path / "tree/sys/devices/system/memory/memory32/state").read_text() == "offline\n"


@pytest.mark.parametrize(
    ("names", "function"), [("6.1", "move_pfn_range_to_zone()"), ("old", "__add_zone()")]
)
def test_trace_prints_either_vocabulary(names: str, function: str) -> None:
    out = kmm("demo", "--trace", "--names", names)
    assert out.exit_code == 0
    assert function in out.output


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_every_example_runs(path: Path) -> None:
    out = kmm("run", path, "--quiet")
    assert out.exit_code == 0, out.output
    assert "zones and watermarks" in out.output


def test_replay_writes_the_recordings_layout(tmp_path: Path) -> None:
    out_file = tmp_path / "model.json"
    assert kmm("replay", RECORDINGS / "unaligned.json", "--out", out_file).exit_code == 0
    model = json.loads(out_file.read_text())
    real = json.loads((RECORDINGS / "unaligned.json").read_text())
    assert [s["step"] for s in model["steps"]] == [s["step"] for s in real["steps"]]


def test_verify_prints_a_table_and_exits_with_1_on_a_difference(tmp_path: Path) -> None:
    good = kmm("verify", RECORDINGS / "unaligned.json", RECORDINGS / "movable_node.json")
    assert good.exit_code == 0
    assert "call chain" in good.output
    broken = json.loads((RECORDINGS / "unaligned.json").read_text())
    broken["steps"][1]["uevents"] = ["add nothing"]
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(broken))
    bad = kmm("verify", path)
    assert bad.exit_code == 1
    assert "uevents: sequence" in bad.output


def one(**fields: object) -> dict[str, object]:
    """A scenario of one step."""
    return {"steps": [fields]}


ALLOC = {"op": "alloc", "id": "a", "count": 1}
MACHINE = {"memory": "1G", "nodes": [{"cpus": "0", "memory": "1G"}, {}]}


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("[", "Invalid"),
        ([1], "not an object"),
        ({"machine": MACHINE}, "steps: missing; allowed: a list of steps"),
        ({"machine": {"memory": "1X"}, "steps": []}, "machine.memory: '1X' is not a size"),
        ({"machine": {"memroy": 1}, "steps": []}, "machine.memroy: 1; no such field; allowed"),
        ({"machine": MACHINE, "steps": [{"op": "fly"}]}, "step 1.op: 'fly'; allowed: alloc"),
        ({"machine": MACHINE, "steps": [{}]}, "step 1.op: missing; allowed: alloc, balloon, boot"),
        ({"machin": MACHINE, "steps": []}, "machin: {'memory': '1G', 'nodes'"),
        ({"steps": [], "titel": "x"}, "titel: 'x'; no such field; allowed: machine, steps, title"),
        ({"steps": [], "title": [1]}, "title: [1]; allowed: text"),
        ({"steps": [], "machine": {"machine": 3}}, "machine.machine: 3; allowed: text"),
        (one(op="sh", line="x", trace="false"), "step 1.trace: 'false'; allowed: true or false"),
        (one(op="sh", line="x", trace=7), "step 1.trace: 7; allowed: true or false"),
        (one(op="sh", line="x", name=[1]), "step 1.name: [1]; allowed: text"),
        (one(op="sh", line="x", timeout="x"), "step 1.timeout: 'x'; allowed: a number of seconds"),
        (one(op="sh", line="x", snap=5), "step 1.snap: 5; allowed: true or false"),
        (one(op="sh", line="x", keep=5), "step 1.keep: 5; allowed: true or false"),
        (one(op="free", id="a"), "step 1.id: 'a'; allowed: the id of an alloc before it"),
        (
            {"steps": [ALLOC, {"op": "free", "id": "b"}]},
            "id: 'b'; allowed: the id of an alloc before it that is not freed yet, one of ['a']",
        ),
        (
            {"steps": [ALLOC, {"op": "free", "id": "a"}, {"op": "free", "id": "a"}]},
            "id: 'a'; allowed: the id of an alloc before it that is not freed yet; there is none",
        ),
        ({"steps": [ALLOC, {"op": "boot"}]}, "step 2.op: 'boot'; allowed: in the first step only"),
        (one(op="plug", id="a", node=0, addr=0, size=10**40), "step 1.size: 1000000000"),
        (one(op="sh", line="x", **{"\x1b[31m": 1}), "step 1.\\x1b[31m: 1; no such field"),
        ('{"steps": [], "steps": []}', "the key 'steps' is there twice in one object"),
        ({"machine": MACHINE, "steps": [{"op": "unplug"}]}, "step 1.id: missing; allowed: text"),
        (
            {"machine": MACHINE, "steps": [{"op": "unplug", "id": "a", "x": 1}]},
            "step 1.x: 1; no such field",
        ),
        (
            {
                "machine": MACHINE,
                "steps": [{"op": "plug", "id": "a", "node": 2, "addr": 0, "size": "1G"}],
            },
            "step 1.node: 2; allowed: 0 to 1",
        ),
        (
            {"machine": MACHINE, "steps": [{"op": "alloc", "id": "a", "count": 1, "gfp": "GFP_X"}]},
            "step 1.gfp: 'GFP_X'; allowed: GFP_KERNEL",
        ),
    ],
)
def test_a_bad_scenario_is_one_clear_sentence(tmp_path: Path, scenario: object, words: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(scenario if isinstance(scenario, str) else json.dumps(scenario))
    out = kmm("run", path)
    assert out.exit_code == 2
    assert "Traceback" not in out.output
    assert "bad.json" in out.output or scenario == "["
    assert words in out.output or scenario == "["


@pytest.mark.parametrize(
    "args",
    [
        ("run", "missing.toml"),
        ("verify", "missing.json"),
        ("replay", "missing.json", "--out", "x"),
        ("run",),
        ("fly",),
    ],
)
def test_usage_errors_exit_with_2(args: tuple[str, ...]) -> None:
    out = kmm(*args)
    assert out.exit_code == 2
    assert "Traceback" not in out.output


def test_steps_that_are_refused_are_shown_and_do_not_end_the_run() -> None:
    scenario = check_scenario(
        {
            "machine": MACHINE,
            "steps": [{"op": "unplug", "id": "none"}, {"op": "read", "path": "/proc/nothing"}],
        },
        "s",
    )
    player = Player(scenario)
    outcomes = [player.play(step) for step in scenario.steps]
    assert outcomes[0].error == "Device 'none' not found"
    assert outcomes[1].error.startswith("ENOENT")
    player.m.validate()


def test_a_step_that_does_nothing_says_so(tmp_path: Path) -> None:
    path = tmp_path / "idle.json"
    steps = [
        {"op": "boot"},
        {"op": "sh", "line": "true"},
        {"op": "write", "path": "/sys/devices/system/memory/memory8/state", "value": "offline"},
        {**ALLOC, "node": 1},
        {"op": "free", "id": "a"},
    ]
    path.write_text(json.dumps({"machine": MACHINE, "steps": steps}))
    out = kmm("run", path)
    assert out.exit_code == 0
    assert "skipped: changes nothing" in out.output
    player = Player(check_scenario({"steps": [ALLOC, {"op": "free", "id": "a"}]}, "s"))
    assert player.play(player.scenario.steps[1]).output == "nothing to free: its alloc was refused"


@pytest.mark.parametrize(
    ("name", "text", "code", "words"),
    [
        ("a.TOML", "steps = []", 0, "resource tree"),
        ("b", '{"steps": []}', 0, "resource tree"),
        ("c", "steps = []", 2, "c: read as JSON: "),
        ("d.Toml", '{"steps": []}', 2, "d.Toml: read as TOML: "),
        ("e.json", "\ufeff" + '{"steps": []}', 0, "resource tree"),
        ("f.toml", "\ufeffsteps = []", 0, "resource tree"),
    ],
)
def test_the_name_says_which_format_a_file_is_in(
    tmp_path: Path, name: str, text: str, code: int, words: str
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    out = kmm("run", tmp_path / name)
    assert (out.exit_code, words in out.output) == (code, True), out.output


def test_mistakes_name_the_file_as_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "twice.json"
    path.write_text('{"steps": 5}')
    assert f"{path}: steps: 5; allowed" in kmm("run", path).output
    broken = json.loads((RECORDINGS / "unaligned.json").read_text())
    broken["machine"]["cpus"] = 0
    path.write_text(json.dumps(broken))
    out = kmm("verify", RECORDINGS / "unaligned.json", path)
    assert out.exit_code == 2
    assert f"{path}: machine.cpus: 0; allowed" in out.output


def test_a_recording_boots_once(tmp_path: Path) -> None:
    broken = json.loads((RECORDINGS / "unaligned.json").read_text())
    broken["steps"][1]["step"] = {"op": "boot"}
    path = tmp_path / "twice.json"
    path.write_text(json.dumps(broken))
    out = kmm("verify", path)
    assert (out.exit_code, "steps[1].step.op: 'boot'; allowed" in out.output) == (2, True)


def test_nothing_of_a_scenario_commands_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "red.json"
    steps = [
        {"op": "sh", "line": "\x1b[31m\n\x07"},
        {"op": "write", "path": "/proc/\x1b[0m", "value": "\x9b1m"},
        {"op": "unplug", "id": "\x1b[32m"},
    ]
    path.write_text(json.dumps({"title": "\x1b[31mred", "steps": steps}))
    out = kmm("run", path)
    assert out.exit_code == 0
    assert all(c.isprintable() for line in out.output.split("\n") for c in line)
    assert out.output.startswith("\\x1b[31mred\n")


def test_json_of_a_trace_for_perfetto_is_that_trace() -> None:
    command = ["trace", "examples/first_dimm.toml", "--format", "perfetto"]
    out = CliRunner().invoke(main, [*command, "--json"])
    assert out.exit_code == 0, out.output
    assert json.loads(out.stdout) == json.loads(CliRunner().invoke(main, command).stdout)
    out = CliRunner().invoke(main, [*command[:2], "--json"])
    assert out.exit_code == 2
    assert "allowed: with -o" in out.output


def test_a_negative_number_of_differences_is_refused() -> None:
    out = CliRunner().invoke(main, ["verify", "tests/recordings/veto.json", "--show", "-5"])
    assert out.exit_code == 2
    assert "-5 is not in the range" in out.output


def test_every_file_to_write_can_be_named_with_o() -> None:
    for name, command in all_commands().items():
        for option in command.params:
            if option.name == "out":
                assert "-o" in option.opts, name


def test_what_is_no_command_is_told_what_is_alike() -> None:
    group = Group(lazy=COMMANDS)
    out = CliRunner().invoke(group, ["repor"])
    assert out.exit_code == 2
    assert "No such command 'repor'" in out.output
    # What click looks for alike names in; what it says of them depends on its version.
    assert group.commands.keys() == COMMANDS.keys()


@pytest.mark.parametrize("words", [["run", "demo", "--save"], ["report", "demo", "-o"]])
def test_where_nothing_can_be_written_is_said_before_the_run(
    tmp_path: Path, words: list[str]
) -> None:
    for place, why in (
        (tmp_path / "no" / "x", "No such file or directory"),
        (tmp_path, "is a dir"),
    ):
        out = kmm(*words, place)
        assert out.exit_code == 2
        assert why in out.output
        assert "step" not in out.output


def test_quiet_does_not_swallow_a_trace(tmp_path: Path) -> None:
    out = kmm("run", EXAMPLES[0], "--quiet", "--trace")
    assert out.exit_code == 2
    assert "--trace with --quiet; allowed: one of them" in out.output


def test_the_package_is_a_command_too() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "kmm", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("kmm, version")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
def test_output_that_cannot_be_written_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "kmm", "run", str(EXAMPLES[0])],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert run.returncode == 1
    assert run.stderr == "Error: standard output: No space left on device\n"


def test_a_reader_that_has_seen_enough_ends_the_run_silently() -> None:
    command = f"{sys.executable} -m kmm demo | head -1"
    run = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert (run.stdout.count("\n"), run.stderr) == (1, "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_are_as_if_nobody_read_them(tmp_path: Path, closed: str) -> None:
    out = tmp_path / "model.json"
    files = [RECORDINGS / "unaligned.json", "--out", out]
    words = shlex.join(map(str, [sys.executable, "-m", "kmm", "replay", *files]))
    run = subprocess.run(
        ["sh", "-c", f"{words} {closed}"], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert json.loads(out.read_text())["steps"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (IndexError("at 7"), "step 2: kmm failed: IndexError: at 7"),
        (MemoryError(), "step 2: this host has not enough memory"),
        (MemoryError("no room for a table"), "step 2: no room for a table"),
        (OSError(28, "No space"), "step 2: kmm failed: OSError: [Errno 28] No space"),
    ],
    ids=repr,
)
def test_a_step_that_fails_unforeseen_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    played = []

    def act(self: Player, step: object) -> str:
        played.append(step)
        if len(played) == 2:
            raise error
        return ""

    monkeypatch.setattr(Player, "_act", act)
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"machine": {}, "steps": [{"op": "read", "path": "/"}] * 3}))
    run = kmm("run", str(path))
    assert run.exit_code == 1
    assert run.output.splitlines()[-1] == f"Error: {said}"
    assert len(played) == 2


@pytest.mark.parametrize("command", ["run", "demo", "verify", "replay", "why"])
def test_any_command_can_be_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def stop(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    for name in ("cli_run.load_scenario", "cli_verify.load_data"):
        monkeypatch.setattr(f"kmm.{name}", stop)
    monkeypatch.setattr("kmm.machine_source.load_scenario", stop)
    args: dict[str, list[object]] = {
        "demo": [],
        "replay": [EXAMPLES[0], "--out", tmp_path / "out"],
        "why": ["1", "--scenario", EXAMPLES[0]],
    }
    run = kmm(command, *args.get(command, [EXAMPLES[0]]))
    assert run.exit_code == 130
    assert run.output.startswith("Error: interrupted")
    assert run.output.count("\n") == 1


def all_commands() -> dict[str, click.Command]:
    context = click.Context(main)
    found = {name: main.get_command(context, name) for name in main.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


@pytest.mark.parametrize("name", sorted(all_commands()))
def test_the_help_of_each_command_has_an_example_that_parses(name: str) -> None:
    text = kmm(name, "--help").output
    (example,) = re.findall(r"Example: kmm (.*)", text)
    words = shlex.split(example.split(">>")[0])
    assert words[0] == name
    command = all_commands()[name]
    # Parsed only: a context that is made knows whether the options and arguments are right.
    command.make_context(name, words[1:])


def test_what_is_printed_can_be_had_as_json(tmp_path: Path) -> None:
    demo = json.loads(kmm("demo", "--json").output)
    assert next(s["error"] for s in demo["steps"] if s["error"]).startswith("EBUSY")
    assert "memory0: online, node 0" in demo["machine"]["sysfs memory blocks of 128 MiB"]
    assert json.loads(kmm("run", EXAMPLES[0], "--json").output)["title"]
    traced = json.loads(kmm("run", EXAMPLES[0], "--json", "--trace").output)
    assert any(call[1] == "add_memory_resource" for s in traced["steps"] for call in s["calls"])
    recording = RECORDINGS / "unaligned.json"
    good = json.loads(kmm("verify", recording, "--json").output)
    assert good["recordings"][str(recording)] == [122, 122]
    out = tmp_path / "model.json"
    assert json.loads(kmm("replay", recording, "--out", out, "--json").output)["out"] == str(out)
    stress = json.loads(kmm("stress", "--operations", "5", "--json").output)
    assert stress["operations"] == 5
    why = kmm("why", "33", "--scenario", FIRST_DIMM, "--steps", "2", "--json")
    assert json.loads(why.output)["block"] == 33


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_can_complete_commands(shell: str) -> None:
    out = kmm("completion", shell)
    assert out.exit_code == 0
    assert f"_KMM_COMPLETE={shell}_complete" in out.output
    if shutil.which(shell) and shell == "bash":
        script = f"{out.output}\nCOMP_WORDS=(kmm ver) COMP_CWORD=1\n_kmm_completion kmm ver kmm\n"
        bin_ = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", script + 'echo "${COMPREPLY[@]}"'],
            capture_output=True,
            text=True,
            env=os.environ | {"PATH": bin_},
        )
        assert done.stdout == "verify\n", done.stderr


TERABYTE = {
    "title": "long",
    "machine": {"memory": "1T", "nodes": [{"cpus": "0", "memory": "1T"}]},
    "steps": [
        {"op": "user", "id": "a", "size": "900G"},
        {"op": "grow", "id": "a"},
    ],
}


def test_a_terabyte_is_interrupted_within_a_second_and_says_where(tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    path.write_text(json.dumps(TERABYTE))
    command = [sys.executable, "-u", "-m", "kmm", "run", str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as run:
        assert run.stdout is not None
        for _ in range(3):  # the title, and what the first step did
            run.stdout.readline()
        time.sleep(0.5)  # by then it is in the engine
        began = time.monotonic()
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=10)
        took = time.monotonic() - began
    assert run.returncode == 130
    assert said == "Error: interrupted after step 1 of 2, in grow a\n"
    assert took < 2  # on a busy machine; half a second of patience


@pytest.mark.parametrize("after", [0.05, 0.1, 0.2, 0.4])
def test_ctrl_c_while_the_command_starts_is_no_traceback(tmp_path: Path, after: float) -> None:
    path = tmp_path / "long.json"
    path.write_text(json.dumps(TERABYTE))
    code = "import kmm_command; kmm_command.main()"
    command = [sys.executable, "-S", "-c", f"import site; site.main(); {code}", "run", str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        time.sleep(after)
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=20)
    assert run.returncode in (130, -signal.SIGINT)
    assert "kmm" not in said or said.startswith("Error: interrupted")


def test_nothing_is_imported_before_ctrl_c_is_seen_to() -> None:
    code = (
        "import site, sys; site.main(); old = set(sys.modules); import kmm_command; "
        "print(*set(sys.modules) - old)"
    )
    run = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True
    )
    assert set(run.stdout.split()) - {"__future__", "_signal"} == {"kmm_command"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
@pytest.mark.parametrize("command", ["demo --save", "replay unaligned --out", "trace x -o"])
def test_a_file_that_cannot_be_finished_is_one_line(command: str) -> None:
    words = command.replace("unaligned", str(RECORDINGS / "unaligned.json")).split()
    words = [str(FIRST_DIMM) if word == "x" else word for word in words]
    out = kmm(*words, "/dev/full")
    assert (out.exit_code, "/dev/full: No space left on device" in out.output) == (1, True)


def test_a_file_without_a_name_is_a_mistake() -> None:
    out = kmm("demo", "--save", "")
    assert (out.exit_code, "Is a directory" in out.output) == (2, True)


def test_a_file_without_an_end_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kmm.data_files.MAX_DATA", 1 << 20)
    out = kmm("run", "/dev/zero")
    assert (out.exit_code, "/dev/zero: more than 1 MiB" in out.output) == (2, True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"kernel": "6.1", "machine": {}, "steps": []}', "a recording, which kmm replay and"),
        ('{"format": "kmm machine"}', "a scenario says machine = { from = ... }"),
        ('{"kmm_run": 1}', "a saved run, which kmm report shows"),
    ],
)
def test_another_file_is_told_from_a_scenario(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    out = kmm("run", path)
    assert (out.exit_code, said in out.output) == (2, True), out.output


def test_a_bar_is_shown_on_a_terminal_after_two_seconds(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    grow = [{"op": "grow", "id": "a", "size": "512M"}, {"op": "shrink", "id": "a", "size": "512M"}]
    data = TERABYTE | {"steps": [TERABYTE["steps"][0], *grow * 30]}  # type: ignore[index]
    path.write_text(json.dumps(data))
    leader, follower = os.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    command = [sys.executable, "-m", "kmm", "run", str(path), "--quiet"]
    seen = b""
    with subprocess.Popen(command, stderr=follower, stdout=subprocess.DEVNULL) as run:
        os.close(follower)
        with contextlib.suppress(OSError):  # which is how the end of a terminal looks
            while more := os.read(leader, 65536):
                seen += more
    os.close(leader)
    assert run.returncode == 0
    assert b"step:" in seen and b"/61" in seen, seen
    short = subprocess.run(
        [sys.executable, "-m", "kmm", "demo"], capture_output=True, text=True, check=True
    )
    assert short.stderr == ""
