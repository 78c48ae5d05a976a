"""The tree as plain files: modes, links, texts, and all of it or nothing."""

import json
import os
import tarfile
from pathlib import Path
from stat import S_IMODE

import pytest
from click.testing import CliRunner

from kmm import sysfs
from kmm.cli import main
from kmm.errors import ConfigError, KernelError
from kmm.export import export_tar, export_tree
from kmm.from_files import read_tree
from kmm.machine import Machine
from kmm.params import GiB, MachineConfig, MiB
from kmm.sysfs import entries

SCENARIO = str(Path(__file__).parent.parent / "examples" / "first_dimm.toml")
# What read_tree and from_files carry over, whole.
SAME = ("iomem", "zoneinfo", "buddyinfo", "pagetypeinfo", "meminfo", "cmdline")


def hotplugged() -> Machine:
    m = Machine(
        MachineConfig.from_dict(
            {
                "memory": "2G",
                "maxmem": "16G",
                "cpus": 4,
                "nodes": [{"cpus": "0-1", "memory": "1G"}, {"cpus": "2-3", "memory": "1G"}],
                "distances": [[10, 21], [21, 10]],
            }
        )
    )
    for i in range(4):
        m.plug(f"d{i}", i // 2, 4 * GiB + i * 512 * MiB, 512 * MiB)
    for block, word in ((32, "online_kernel"), (33, "online_movable"), (40, "online")):
        m.write(f"/sys/devices/system/memory/memory{block}/state", word)
    return m


def test_every_entry_is_there_with_its_mode_text_and_target(tmp_path):
    m = hotplugged()
    done = export_tree(m, tmp_path / "tree")
    seen = 0
    for path, entry in entries(m):
        if entry.read_at is not None:
            assert not os.path.exists(f"{tmp_path}/tree{path}")
            continue
        seen += 1
        place = f"{tmp_path}/tree{path}"
        info = os.lstat(place)
        kind = sysfs.stat(m, path)
        if kind.kind == "link":
            assert os.readlink(place) == sysfs.readlink(m, path)
            assert os.path.exists(place), f"{path} leads nowhere"
        elif kind.kind == "directory":
            texts = [n for n in m.listdir(path) if n != "kpageflags"]
            assert sorted(os.listdir(place)) == texts
            assert S_IMODE(info.st_mode) == 0o755
        else:
            assert S_IMODE(info.st_mode) == kind.mode
            unread = entry.read is None or path.endswith("/autosuspend_delay_ms")
            text = "" if unread else m.read(path)
            assert Path(place).read_text() == text
    assert seen == done.files + done.links + done.directories > 700
    assert sorted(os.listdir(tmp_path / "tree")) == ["proc", "sys"]
    m.validate()


def test_a_machine_of_an_export_shows_the_same_texts(tmp_path):
    m = hotplugged()
    export_tree(m, tmp_path / "tree")
    again = Machine.from_files(read_tree(tmp_path / "tree"))
    for name in SAME:
        assert again.read(f"/proc/{name}") == m.read(f"/proc/{name}"), name
    for top in ("/sys/devices/system/memory", "/sys/devices/system/node"):
        both = [
            [p for p, e in entries(of, top) if e.read is not None and not p.endswith("_delay_ms")]
            for of in (m, again)
        ]
        assert both[0] == both[1]
        for path in both[0]:
            assert again.read(path) == m.read(path), path
    again.validate()


def test_an_export_is_not_written_over_what_is_there(tmp_path):
    (tmp_path / "mine").write_text("keep")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/old").write_text("gone with force")
    with pytest.raises(ConfigError, match=r"not empty \(2 entries\)"):
        export_tree(Machine(), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["mine", "proc"]
    export_tree(Machine(), tmp_path, force=True)
    assert sorted(os.listdir(tmp_path)) == ["mine", "proc", "sys"]
    assert (tmp_path / "mine").read_text() == "keep"
    assert not (tmp_path / "proc/old").exists()


def test_an_export_that_fails_leaves_the_directory_as_it_was(tmp_path, monkeypatch):
    target = tmp_path / "tree"
    export_tree(Machine(), target)
    before = sorted(os.walk(target))
    text = (target / "proc/zoneinfo").read_text()
    links, symlink = [], os.symlink

    def full(to, path, *args):
        links.append(path)
        if len(links) == 20:
            raise OSError(28, "No space left on device", path)
        symlink(to, path, *args)

    monkeypatch.setattr(os, "symlink", full)
    m = hotplugged()
    with pytest.raises(ConfigError, match="No space left on device; nothing written"):
        export_tree(m, target, force=True)
    assert len(links) == 20
    assert sorted(os.walk(target)) == before
    assert (target / "proc/zoneinfo").read_text() == text
    links.clear()
    with pytest.raises(ConfigError, match="No space left"):
        export_tree(m, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_move_that_fails_puts_the_old_tree_back(tmp_path, monkeypatch):
    target = tmp_path / "tree"
    export_tree(Machine(), target)
    before = sorted(os.walk(target))
    rename = Path.rename

    def refuse(self, place):
        if self.parent.name == "new" and self.name == "sys":
            raise OSError(16, "Device or resource busy", str(self))
        return rename(self, place)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ConfigError, match="Device or resource busy; nothing written"):
        export_tree(hotplugged(), target, force=True)
    assert sorted(os.walk(target)) == before


@pytest.mark.parametrize("name", ["tree.tar", "tree.tar.gz", "tree.tgz", "tree.tar.xz"])
def test_a_tar_file_holds_the_tree_and_is_the_same_each_time(tmp_path, name):
    done = export_tar(hotplugged(), tmp_path / name)
    export_tree(hotplugged(), tmp_path / "tree")
    with tarfile.open(tmp_path / name) as tar:
        members = tar.getmembers()
        assert len(members) == done.files + done.links + done.directories
        tar.extractall(tmp_path / "out", filter="fully_trusted")
    for path, entry in entries(hotplugged()):
        if entry.read_at is not None:
            continue
        a, b = f"{tmp_path}/tree{path}", f"{tmp_path}/out{path}"
        assert os.lstat(a).st_mode == os.lstat(b).st_mode, path
        if os.path.isfile(a) and not os.path.islink(a):
            assert Path(a).read_text() == Path(b).read_text()
    first = (tmp_path / name).read_bytes()
    with pytest.raises(ConfigError, match="there already"):
        export_tar(hotplugged(), tmp_path / name)
    export_tar(hotplugged(), tmp_path / name, force=True)
    assert (tmp_path / name).read_bytes() == first


def test_the_command_takes_the_machines_that_others_take(tmp_path):
    run = CliRunner().invoke
    at = str(tmp_path / "a")
    out = run(main, ["export", at, "--scenario", SCENARIO, "--steps", "3", "--json"])
    assert out.exit_code == 0, out.output
    assert json.loads(out.output)["files"] > 100
    state = "sys/devices/system/memory/memory33/state"
    assert (tmp_path / "a" / state).read_text() == "online\n"
    assert run(main, ["export", str(tmp_path / "b"), "--from", at]).exit_code == 0
    assert (tmp_path / "b" / state).read_text() == "online\n"
    zones = [(tmp_path / d / "proc/zoneinfo").read_text() for d in "ab"]
    assert zones[0] == zones[1]
    tar = str(tmp_path / "c.tar.gz")
    assert run(main, ["export", "-o", tar]).output.startswith(f"{tar}: ")


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        ([], 2, "one of DIRECTORY and -o"),
        (["{}/x", "-o", "{}/x.tar"], 2, "one of DIRECTORY and -o"),
        (["-o", "{}/x.zip"], 2, "a name that ends in .tar"),
        (["{}/x", "--steps", "2"], 2, "with --scenario or --from"),
        (["{}/x", "--scenario", SCENARIO, "--from", "/"], 2, "one of --scenario and --from"),
        (["{}/x", "--scenario", SCENARIO, "--steps", "99"], 2, "allowed: 0 to"),
        (["/", "--force"], 2, "other than the root"),
        (["{}/file"], 2, "Not a directory"),
        (["{}/no/such/place"], 2, "No such file or directory"),
        (["-o", "{}/no/x.tar"], 2, "No such file or directory"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, args, status, words):
    (tmp_path / "file").write_text("")
    out = CliRunner().invoke(main, ["export", *(a.format(tmp_path) for a in args)])
    assert out.exit_code == status, out.output
    assert words in out.output
    assert "Traceback" not in out.output
    assert sorted(os.listdir(tmp_path)) == ["file"]


def test_entries_begin_where_they_are_asked_to():
    m = Machine()
    assert next(p for p, _ in entries(m, "/sys/kernel/debug")) == "/sys/kernel/debug/extfrag"
    with pytest.raises(KernelError):
        list(entries(m, "/sys/nowhere"))
