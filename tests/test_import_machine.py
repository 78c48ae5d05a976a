"""The twin of a real machine: texts in, the same texts out, and a report of the rest."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from kmm import ConfigError, Machine, MachineConfig, machine_repairs
from kmm.cli import main
from kmm.export import export_tree
from kmm.import_machine import Twin, as_json, build, import_machine
from kmm.machine_files import Collected, collect
from kmm.snapshot import dump
from kmm.vmstat import node_items
from tests.conftest import recording
from tests.odd_machines import GIB, machine
from tests.test_bad_files import quick, spoil
from tests.test_from_files import save

NODE, MEMORY = "/sys/devices/system/node/", "/sys/devices/system/memory/"
MIB = 1 << 20


def recorded(name: str, step: int = 0) -> dict[str, str]:
    return {p: t for p, t in recording(name)["steps"][step]["files"].items() if p[0] == "/"}


def assert_same_texts(twin: Twin) -> None:
    """Every text that was read is given back, but for files that kmm says it does not show."""
    # Reading lowmem_reserve_ratio has the kernel work out the reserves anew: it comes last.
    for path, text in sorted(twin.collected.files.items(), key=lambda f: "lowmem" in f[0]):
        if text != "link" and text.strip() and path not in twin.report.hidden:
            assert twin.machine.read(path).rstrip("\n") == text.rstrip("\n"), path
    twin.machine.validate()


def status(twin: Twin, path: str) -> str:
    return next((n.status for n in twin.report.notes if n.path == path), "")


def twin_of(files: dict[str, str], **more: dict[str, str]) -> Twin:
    return build(Collected("test", dict(files), **more))


@pytest.mark.parametrize(
    "name",
    ["movable_node", "four_nodes", "five_nodes", "boot_6_gib", "hugetlb_used", "memmap_on_memory"],
)
def test_a_recorded_machine_gives_its_texts_back(name: str, tmp_path: Path) -> None:
    for step in (0, -1):
        steps = [s for s in recording(name)["steps"] if "files" in s]
        folder = tmp_path / str(step)
        save({p: t for p, t in steps[step]["files"].items() if p[0] == "/"}, folder)
        twin = import_machine(folder)
        file = tmp_path / "machine.json"
        file.write_text(as_json(twin.collected))
        again = import_machine(file)
        assert dump(again.machine) == dump(twin.machine)
        assert again.report.as_dict() == twin.report.as_dict()
        assert_same_texts(twin)
        assert_same_texts(again)


@pytest.mark.skipif(
    not os.access("/proc/pagetypeinfo", os.R_OK) or not os.path.exists("/proc/iomem"),
    reason="not privileged on a Linux host",
)
def test_this_host(tmp_path: Path) -> None:
    collected = collect("/")
    assert collected.live
    try:
        twin = build(collected)
    except ConfigError as e:
        # A host that kmm cannot model says in one line why.
        assert "\n" not in str(e)
        return
    assert_same_texts(twin)


def test_the_command_writes_what_the_others_take(tmp_path: Path) -> None:
    files = recorded("movable_node")
    save({p: t for p, t in files.items() if p != "/proc/vmstat"}, tmp_path / "saved")
    out = tmp_path / "machine.json"
    run = CliRunner()
    result = run.invoke(main, ["import", str(tmp_path / "saved"), "-o", str(out)])
    assert result.exit_code == 1, result.output
    assert "missing:\n" in result.output and "/proc/vmstat\n    assumed: events" in result.output
    result = run.invoke(main, ["import", str(out), "--json"])
    report = json.loads(result.output)
    assert report["doubts"] and report["assumed_always"]
    by_path = {f["path"]: f for f in report["files"]}
    assert by_path["/proc/iomem"]["status"] == "present"
    assert by_path["/proc/vmstat"]["status"] == "missing"
    result = run.invoke(main, ["why", "1", "--from", str(out)])
    assert result.exit_code in (0, 1) and result.output.startswith("memory1 ")
    scenario = tmp_path / "scenario.toml"
    scenario.write_text(
        '[machine]\nfrom = "machine.json"\n[[steps]]\nop = "read"\npath = "/proc/buddyinfo"\n'
    )
    result = run.invoke(main, ["run", str(scenario)])
    assert result.exit_code == 0, result.output
    assert recorded("movable_node")["/proc/buddyinfo"].split("\n")[0].rstrip() in result.output


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        ('from = "gone.json"', "gone.json: no such file"),
        ("from = 5", "machine.from: 5; allowed: the path"),
        ('from = "x"\ncpus = 2', "machine.cpus: 2; allowed: none beside 'from'"),
        ('from = "scenario.toml"', "no tar file"),
    ],
)
def test_a_scenario_whose_machine_is_not_there(machine: str, words: str, tmp_path: Path) -> None:
    scenario = tmp_path / "scenario.toml"
    scenario.write_text(f"steps = []\n[machine]\n{machine}\n")
    result = CliRunner().invoke(main, ["run", str(scenario)])
    assert result.exit_code == 2
    assert words in result.output and "scenario.toml" in result.output


# -- archives ---------------------------------------------------------------------------


def archive(path: Path, files: dict[str, str], prefix: str = "", mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(prefix + name.lstrip("/"))
            if text == "link":
                info.type, info.linkname = tarfile.SYMTYPE, "../somewhere"
                tar.addfile(info)
            else:
                # As tar stores a file of sysfs: padded to the size that it claims.
                data = text.encode() + b"\n" + b"\0" * 100 * name.startswith("/sys")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("prefix", ["", "./", "sosreport-host-1/"])
def test_an_archive_is_the_directory(mode: str, prefix: str, tmp_path: Path) -> None:
    files = recorded("four_nodes", 0)
    path = archive(tmp_path / "saved", files, prefix, mode)
    save(files, tmp_path / "dir")
    folder = collect(tmp_path / "dir").files
    # Archives need not name the directories that their files are in.
    assert collect(path).files == {p: t for p, t in folder.items() if p in files}
    assert_same_texts(import_machine(path))
    result = CliRunner().invoke(main, ["why", "1", "--from", str(path)])
    assert result.output.startswith("memory1 ")


def test_an_archive_cannot_reach_out_of_itself(tmp_path: Path) -> None:
    files = recorded("movable_node")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    path = tmp_path / "saved.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("../proc/iomem", "/../../proc/meminfo", "a/../../proc/vmstat"):
            info = tarfile.TarInfo(name)
            info.size = 6
            tar.addfile(info, io.BytesIO(b"secret"))
        info = tarfile.TarInfo("proc/cmdline")
        info.type, info.linkname = tarfile.SYMTYPE, str(secret)
        tar.addfile(info)
        for name, text in files.items():
            if text != "link" and name != "/proc/cmdline":
                info = tarfile.TarInfo(name)
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text.encode()))
    found = collect(path)
    assert "secret" not in found.files.values()
    assert found.unreadable == {"/proc/cmdline": "a link to what the archive does not hold"}
    assert status(build(found), "/proc/cmdline") == "unreadable"


def test_a_link_inside_an_archive_is_followed(tmp_path: Path) -> None:
    files = recorded("movable_node")
    path = archive(tmp_path / "saved.tar", {k: v for k, v in files.items() if k != "/proc/iomem"})
    with tarfile.open(tmp_path / "plain.tar", "w") as tar, tarfile.open(path) as old:
        for info in old:
            tar.addfile(info, old.extractfile(info) if info.isreg() else None)
        info = tarfile.TarInfo("proc/sys/vm/x")
        data = files["/proc/iomem"].encode()
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo("proc/iomem")
        info.type, info.linkname = tarfile.SYMTYPE, "sys/vm/x"
        tar.addfile(info)
    assert collect(tmp_path / "plain.tar").files["/proc/iomem"] == files["/proc/iomem"]


def test_an_archive_that_is_broken_or_a_bomb(tmp_path: Path, monkeypatch) -> None:
    good = archive(tmp_path / "good.tgz", recorded("movable_node")).read_bytes()
    cases = {
        "cut": (good[: len(good) // 2], "cut off"),
        "junk": (b"\x1f\x8b" + b"x" * 5000, "allowed: tar"),
        "noise": (bytes(range(256)) * 10, "no tar file"),
        "empty": (b"", "no tar file"),
        "zstd": (b"\x28\xb5\x2f\xfd" + b"0" * 99, "compressed by zstd; allowed: tar"),
    }
    for name, (data, words) in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=words) as e:
            import_machine(path)
        assert name in str(e.value)
    bomb = tmp_path / "bomb.tgz"
    with tarfile.open(bomb, "w:gz") as tar:
        info = tarfile.TarInfo("x")
        info.size = 8 * MIB
        tar.addfile(info, io.BytesIO(b"\0" * info.size))
    monkeypatch.setattr("kmm.machine_files.RATIO_FROM", MIB)
    with pytest.raises(ConfigError, match="unpacks to more than 200 times its size"):
        import_machine(bomb)


def test_two_machines_in_one_place(tmp_path: Path) -> None:
    files = recorded("movable_node")
    for name in ("a", "b"):
        save(files, tmp_path / "dir" / name)
    with pytest.raises(ConfigError, match=r"several machines in it \(a, b\); allowed: one"):
        import_machine(tmp_path / "dir")
    with tarfile.open(tmp_path / "two.tar", "w") as tar:
        tar.add(tmp_path / "dir" / "a", "a")
        tar.add(tmp_path / "dir" / "b", "b")
    with pytest.raises(ConfigError, match=r"several machines in it \('a', 'b'\)"):
        import_machine(tmp_path / "two.tar")


# -- what is missing --------------------------------------------------------------------


def test_without_counts_of_free_blocks() -> None:
    files = recorded("four_nodes")
    twin = twin_of({p: t for p, t in files.items() if p != "/proc/pagetypeinfo"})
    assert status(twin, "/proc/pagetypeinfo") == "missing"
    assert_same_texts(twin)
    for path in ("/proc/pagetypeinfo", "/proc/buddyinfo"):
        del files[path]
    twin = twin_of(files)
    assert_same_texts(twin)
    shown = re.findall(r"pages free +(\d+)", files["/proc/zoneinfo"])
    m = twin.machine
    assert sum(z.nr_free_pages for z in m.all_zones()) == sum(map(int, shown))
    free = m.free_blocks().sum(axis=(0, 1))
    assert free[0].sum() == free[2:].sum() == 0  # all are Movable
    m.free_pages_bulk(m.alloc_pages_bulk(100))
    m.validate()


def test_without_block_devices_or_nodes() -> None:
    files = recorded("four_nodes")
    bare = {p: t for p, t in files.items() if not p.startswith("/sys/")}
    twin = twin_of(bare)
    assert_same_texts(twin)
    assert status(twin, MEMORY + "memory*/state") == "missing"
    assert status(twin, NODE + "possible") == "derived"
    wanted = {int(n) for n in re.findall(r"^Node (\d+)", files["/proc/zoneinfo"], re.M)}
    assert twin.machine.n_online == wanted


LSMEM = """\
RANGE                                  SIZE   STATE REMOVABLE  ZONES NODE BLOCK
{rows}
Memory block size:       128M
Total online memory:       1G
"""


def test_a_sosreport_tells_of_blocks_by_lsmem(tmp_path: Path) -> None:
    files = recorded("kernel_zone", 4)
    rows = []
    for path, text in files.items():
        if match := re.fullmatch(MEMORY + r"memory(\d+)/state", path):
            n = int(match[1])
            base = f"{MEMORY}memory{n}/"
            nid = next(p[len(base) + 4 :] for p in files if p.startswith(base + "node"))
            zones = files[base + "valid_zones"].strip().replace(" ", "/").replace("none", "None")
            end = (n + 1) * 128 * MIB - 1
            rows.append(
                f"{n * 128 * MIB:#018x}-{end:#018x}  128M {text.strip():>7} yes {zones} {nid} {n}"
            )
    sos = {
        p: t for p, t in files.items() if not re.search("/system/memory/|/possible|/proc/sys/", p)
    }
    root = tmp_path / "sosreport-x"
    save(sos, root)
    command = root / "sos_commands/memory/lsmem_-a_-o_RANGE_SIZE_STATE_REMOVABLE_ZONES_NODE_BLOCK"
    command.parent.mkdir(parents=True)
    command.write_text(LSMEM.format(rows="\n".join(rows)))
    sysctl = root / "sos_commands/kernel/sysctl_-a"
    sysctl.parent.mkdir(parents=True)
    sysctl.write_text("vm.swappiness = 7\nvm.dirty_ratio = 33\nkernel.x = 1\n")
    with tarfile.open(tmp_path / "sos.tar.xz", "w:xz") as tar:
        tar.add(root, "sosreport-x")
    for source in (tmp_path, root, tmp_path / "sos.tar.xz"):
        twin = import_machine(source)
        assert_same_texts(twin)
        m, real = twin.machine, Machine.from_files(files)
        assert {b.block_id: (b.state, b.nid) for b in m.memory_blocks.values()} == {
            b.block_id: (b.state, b.nid) for b in real.memory_blocks.values()
        }
        assert m.read("/proc/sys/vm/swappiness") == "7\n"
        assert status(twin, MEMORY + "memory*/state") == "derived"


def test_files_that_an_ordinary_user_reads() -> None:
    files = recorded("movable_node")
    zeros = re.sub(r"[0-9a-f]{8,}-[0-9a-f]{8,}", "00000000-00000000", files["/proc/iomem"])
    with pytest.raises(ConfigError, match=r"all its addresses are zero.*as root"):
        twin_of({**files, "/proc/iomem": zeros})
    with pytest.raises(ConfigError, match="/proc/zoneinfo: empty; tar stores files of /proc as"):
        twin_of({**files, "/proc/zoneinfo": ""})
    denied = {"/proc/pagetypeinfo": "Permission denied"}
    del files["/proc/pagetypeinfo"]
    twin = twin_of(files, unreadable=denied)
    note = next(n for n in twin.report.notes if n.path == "/proc/pagetypeinfo")
    assert (note.status, note.detail) == ("unreadable", "Permission denied; copy it as root")
    assert "Movable" in note.assumed
    with pytest.raises(ConfigError, match=r"/proc/iomem: Permission denied; needed: .*as root"):
        twin_of({}, unreadable={"/proc/iomem": "Permission denied"})


# -- what does not fit ------------------------------------------------------------------


def test_a_file_that_does_not_fit_is_left_out() -> None:
    files = recorded("movable_node")
    for path, text in (
        ("/proc/sys/vm/swappiness", "ten"),
        ("/proc/buddyinfo", re.sub(r" \d+ *$", " 99999999 ", files["/proc/buddyinfo"])),
        (NODE + "node0/distance", "999"),
        ("/sys/firmware/memmap/0/start", "x"),
    ):
        gone = {p: t for p, t in files.items() if p != "/proc/pagetypeinfo"}
        twin = twin_of(gone | {path: text})
        mended = [n for n in twin.report.notes if n.status == "inconsistent"]
        assert [n.path for n in mended] == [path] and mended[0].detail.startswith("left out: ")
        assert twin.report.doubts
        twin.machine.validate()


def test_a_few_pages_that_two_files_disagree_about() -> None:
    files = recorded("movable_node")
    real = Machine.from_files(files).nodes[0].zone(1).present_pages
    text = files["/proc/zoneinfo"]
    twin = twin_of(
        {**files, "/proc/zoneinfo": re.sub(f"present +{real}", f"present {real + 5}", text)}
    )
    assert status(twin, "/proc/zoneinfo") == "present"
    mended = next(n for n in twin.report.notes if n.status == "inconsistent")
    assert mended.detail.endswith(f"present {real + 5} taken as {real}, as /proc/iomem has")
    assert twin.machine.nodes[0].zone(1).present_pages == real
    assert_same_texts(twin)
    with pytest.raises(ConfigError, match=r"present .*; /proc/iomem and the memory blocks make"):
        twin_of(
            {**files, "/proc/zoneinfo": re.sub(f"present +{real}", f"present {real * 2}", text)}
        )


def test_counters_that_were_read_at_another_moment_are_listed() -> None:
    files = recorded("movable_node")
    free = int(re.search(r"MemFree: +(\d+)", files["/proc/meminfo"])[1])
    files["/proc/meminfo"] = files["/proc/meminfo"].replace(str(free), str(free + 400))
    twin = twin_of(files)
    assert_same_texts(twin)
    mine = [d for d in twin.report.differences if d.saved == f"MemFree: {free + 400} kB"]
    assert len(mine) == 1 and mine[0].model != mine[0].saved
    m = twin.machine
    m.alloc_pages_bulk(16, 4)
    # It goes on from what was saved.
    assert f"MemFree:{free + 400 - 1024:>16} kB\n" in m.read("/proc/meminfo")
    m.validate()


@pytest.mark.parametrize(
    ("shift", "words"), [(16, "pages of 64 KiB; allowed: pages of 4 KiB"), (14, "of 16 KiB")]
)
def test_pages_of_another_size_are_refused(shift: int, words: str) -> None:
    files = recorded("movable_node")

    def fewer(match: re.Match[str]) -> str:
        return f"{match[1]}{int(match[2]) >> (shift - 12)}"

    text = re.sub(r"((?:present|managed|spanned) +)(\d+)", fewer, files["/proc/zoneinfo"])
    with pytest.raises(ConfigError, match=words):
        twin_of({**files, "/proc/zoneinfo": text})


def test_memory_beyond_46_bits_is_refused() -> None:
    files = recorded("movable_node")
    files["/proc/iomem"] += "\n400000000000-4000ffffffff : System RAM"
    with pytest.raises(ConfigError, match="System RAM up to 0x4000ffffffff; allowed: to 0x3fff"):
        twin_of(files)


def test_possible_nodes_beyond_what_kmm_has() -> None:
    files = recorded("movable_node")
    twin = twin_of({**files, NODE + "possible": "0-127"})
    assert len(twin.machine.nodes) <= 64
    assert any(n.path == NODE + "possible" for n in twin.report.notes if n.status != "present")
    assert_same_texts(twin)
    text = files["/proc/zoneinfo"] + "\n" + files["/proc/zoneinfo"].replace("Node 0", "Node 70")
    with pytest.raises(ConfigError, match="/proc/zoneinfo: node 70; allowed: 0 to 63"):
        twin_of({**files, "/proc/zoneinfo": text, NODE + "possible": "0-127"})


# -- other kernels ----------------------------------------------------------------------


def test_another_kernels_lines_stay() -> None:
    """Fields that 6.1 has not, fields that are missing, and counters by zone as before 5.14."""
    files = recorded("four_nodes")
    text = files["/proc/zoneinfo"]
    text = re.sub(r"\n +boost +\d+", "", text)
    text = re.sub(r"(\n +high +\d+)(\n +spanned)", r"\1\n        promo    77\2", text)
    text = re.sub(r"\n +nr_kernel_stack +\d+", "", text)
    text = re.sub(r"(\n +nr_mlock +\d+)", r"\1\n      nr_kernel_stack 16", text)
    text = re.sub(r"count: (\d+)", r"count:    \1\n              high_min: 3", text)
    files["/proc/zoneinfo"] = text
    files["/proc/meminfo"] += "\nBalloon:            12 kB"
    files[MODULE] = "force"
    twin = twin_of(files)
    assert_same_texts(twin)
    m = twin.machine
    assert m.memmap_on_memory
    zones = [z for z in m.nodes[0].zones if z.populated]
    assert node_items(m, m.nodes[0])["nr_kernel_stack"] == 16 * len(zones)
    m.alloc_pages_bulk(1000)
    now = m.read("/proc/zoneinfo")
    assert now.count("promo    77") == text.count("promo    77") > 0
    assert "high_min: 3" in now and now != text + "\n"
    assert "Balloon:            12 kB\n" in m.read("/proc/meminfo")
    m.validate()


MODULE = "/sys/module/memory_hotplug/parameters/memmap_on_memory"


def test_types_that_the_reference_build_has_not_count_as_movable() -> None:
    files = recorded("movable_node")
    lines = []
    for line in files["/proc/pagetypeinfo"].split("\n"):
        if line.startswith("Number of blocks"):
            line = line.replace("Isolate", "CMA      Isolate")
        elif match := re.match(r"(Node 0, zone +\w+ +\d+ +)(\d+)(.*?)(\d+ *)$", line):
            line = f"{match[1]}{int(match[2]) - 1}{match[3]}1 {match[4]}"
        lines.append(line)
        if match := re.match(r"(Node +0, zone +DMA32, type +)HighAtomic", line):
            lines.append(f"{match[1]}    CMA" + " 0" * 11)
    real = Machine.from_files(files)
    twin = twin_of({**files, "/proc/pagetypeinfo": "\n".join(lines)})
    assert_same_texts(twin)
    assert any("CMA taken as Movable" in n.detail for n in twin.report.notes)
    assert (twin.machine.free_blocks() == real.free_blocks()).all()


def test_counts_above_100000_are_taken_from_buddyinfo() -> None:
    files = recorded("movable_node")
    rows = re.findall(r"^Node +0, zone +DMA32, type +Movable +(\d+)", files["/proc/pagetypeinfo"])
    assert not rows
    m = Machine.from_files(files)
    free = m.free_blocks()[0, 1]
    typed = re.sub(
        r"(zone +DMA32, type +Movable +)\d+", r"\g<1>>100000", files["/proc/pagetypeinfo"]
    )
    have = int(free[:, 0].sum())
    more = 120000
    budd = re.sub(r"(zone +DMA32 +)\d+", rf"\g<1>{more}", files["/proc/buddyinfo"])
    # So many single pages want room: none of the largest blocks are left.
    typed = re.sub(r"(DMA32, type +Movable.*?) \d+ *$", r"\1 0 ", typed, flags=re.M)
    twin = twin_of({**files, "/proc/buddyinfo": budd, "/proc/pagetypeinfo": typed})
    after = twin.machine.free_blocks()[0, 1]
    assert int(after[:, 0].sum()) == more > have
    twin.machine.validate()


def test_a_terabyte_with_more_large_blocks_than_pagetypeinfo_counts_comes_back(
    tmp_path: Path,
) -> None:
    m = Machine(
        MachineConfig.from_dict(
            {
                "memory": "32G",
                "maxmem": "2T",
                "cpus": 4,
                "nodes": [{"cpus": "0-3", "memory": "32G"}, {}],
                "cmdline": "memhp_default_state=online_movable",
                "block_size": 2 << 30,
            }
        )
    )
    m.plug("a", 1, 1 << 40, 1 << 40)
    assert ">100000" in m.read("/proc/pagetypeinfo")
    export_tree(m, tmp_path / "tree")
    twin = import_machine(tmp_path / "tree")
    assert not twin.report.doubts
    assert (twin.machine.free_blocks() == m.free_blocks()).all()
    assert_same_texts(twin)
    twin.machine.validate()


def test_of_two_counts_above_100000_both_are_guesses() -> None:
    type_ = "Node    0, zone   Normal, type "
    lines = [type_ + f" {kind} >100000 5" for kind in ("Unmovable", "Movable")]
    out, guessed = machine_repairs._uncap(lines, {"0 Normal": [250000, 10]})
    assert guessed == 2
    assert sum(int(line.split()[-2]) for line in out) == 250000
    out, guessed = machine_repairs._uncap(lines[:1], {"0 Normal": [250000, 5]})
    assert (out, guessed) == ([type_ + " Unmovable 250000 5"], 0)
    for buddy in ({}, {"0 Normal": [90000, 5]}):
        out, guessed = machine_repairs._uncap(lines[:1], buddy)
        assert (out, guessed) == ([type_ + " Unmovable 100001 5"], 1)


def test_a_sum_of_which_a_part_is_cut_off_is_so_too() -> None:
    type_ = "Node    0, zone   Normal, type "
    lines = [type_ + f" {kind} {n} 5" for kind, n in (("Movable", 5), ("CMA", ">100000"))]
    merged = machine_repairs._merge_types(lines, ["Movable", "CMA"], ["CMA"])
    assert merged == [type_ + " Movable >100000 10"]
    out, guessed = machine_repairs._uncap(merged, {"0 Normal": [400000, 10]})
    assert (out, guessed) == ([type_ + " Movable 400000 10"], 0)


# -- odd machines -----------------------------------------------------------------------

T = 1 << 40
DEVICES = f"""\
{T:x}-{T + GIB - 1:x} : Persistent Memory
  {T:x}-{T + GIB - 1:x} : namespace0.0
{2 * T:x}-{2 * T + 64 * GIB - 1:x} : PCI Bus 0000:00
  {2 * T:x}-{2 * T + 64 * GIB - 1:x} : 0000:00:01.0
    {2 * T:x}-{2 * T + 64 * GIB - 1:x} : nvidia
{3 * T:x}-{3 * T + GIB - 1:x} : Soft Reserved
{4 * T:x}-{4 * T + GIB - 1:x} : Reserved
7ffffffffff0000-7fffffffffffffff : PCI Bus 0000:ff
"""


@pytest.mark.parametrize(
    ("made", "nodes", "offline"),
    [
        ({"nodes": 2, "gib": 4, "block": 2 * GIB}, 2, 0),
        ({"nodes": 4, "kmem": {2, 3}}, 4, 0),
        ({"nodes": 3, "without_memory": {1}}, 2, 0),
        ({"nodes": 2, "offline": {34, 50}}, 2, 2),
        ({"nodes": 12, "cpus": 43}, 12, 0),
        ({"nodes": 64, "gib": 1, "cpus": 1}, 64, 0),
        ({"nodes": 2, "iomem": DEVICES}, 2, 0),
    ],
)
def test_odd_machines(made, nodes: int, offline: int) -> None:
    twin = twin_of(machine(**made))
    m = twin.machine
    assert_same_texts(twin)
    assert len(m.n_memory) == nodes and len(m.nodes) == made["nodes"]
    assert sum(b.state == "offline" for b in m.memory_blocks.values()) == offline
    m.free_pages_bulk(m.alloc_pages_bulk(100, nid=made["nodes"] - 1))
    m.validate()


def test_memory_behind_cxl_can_go_and_come_back() -> None:
    m = twin_of(machine(4, kmem={2, 3})).machine
    # The node's pages in use are laid out from its bottom up: half of it is free.
    block = 10 * GIB // (128 * MIB) - 1
    assert m.explain_offline(block).can_go
    state = f"{MEMORY}memory{block}/state"
    for word in ("offline", "online_movable"):
        m.write(state, word)
        m.validate()
    assert m.read(state) == "online\n"


def test_what_pages_laid_out_from_counts_keep_from_going_is_not_certain() -> None:
    twin = twin_of(machine(2))
    said = [twin.machine.explain_offline(b) for b in twin.machine.memory_blocks]
    guessed = [s for s in said if s.obstacles and all(o.guessed for o in s.obstacles)]
    assert guessed
    for s in guessed:
        assert not s.can_go and not s.certain
        assert "might not go offline now" in str(s)
        assert "laid out from counts" in "".join(s.assumptions)
    free = [s for s in said if s.can_go and not s.moves]
    assert free and all(s.certain for s in free)
    assert "mixed zones" in str(said[0]) and said[0].certain


def test_crash_kernel_and_huge_pages() -> None:
    files = machine(2)
    files["/proc/iomem"] = files["/proc/iomem"].replace(
        "00100000-7fffffff : System RAM",
        "00100000-7fffffff : System RAM\n  2d000000-3cffffff : Crash kernel",
    )
    files["/proc/cmdline"] = "ro crashkernel=256M hugepagesz=1G hugepages=1 default_hugepagesz=2M"
    files["/proc/meminfo"] = "HugePages_Total:     100\nHugePages_Rsvd:        3"
    files[NODE + "node1/meminfo"] = "Node 1 HugePages_Total: 100\nNode 1 HugePages_Free: 40"
    twin = twin_of(files)
    assert_same_texts(twin)
    pool = twin.machine.default_hstate
    assert (pool.nr_huge_pages_node[1], pool.free_huge_pages) == (100, 40)


def test_the_pools_of_huge_pages_that_there_are_and_their_surplus() -> None:
    pool = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
    files = machine(2) | {pool: "0", "/proc/sys/vm/nr_overcommit_hugepages": "7"}
    twin = twin_of(files)
    assert_same_texts(twin)
    assert twin.machine.listdir("/sys/kernel/mm/hugepages") == ["hugepages-2048kB"]
    assert twin.machine.read(pool.replace("nr_", "nr_overcommit_")) == "7\n"
    assert not [d for d in twin.report.differences if "hugepages" in d.path]
    gigantic = pool.replace("2048kB", "1048576kB")
    assert len(twin_of(files | {gigantic: "0"}).machine.hstates) == 2
    # Without files of pools, as x86-64's CPUs of today have it.
    del files[pool]
    assert len(twin_of(files).machine.hstates) == 2


@pytest.mark.parametrize("text", ["-1", "many", "9" * 40])
def test_a_number_of_surplus_pages_that_is_none_is_left_out(text: str) -> None:
    path = "/proc/sys/vm/nr_overcommit_hugepages"
    twin = twin_of(machine(2) | {path: text})
    assert status(twin, path) == "inconsistent"
    assert twin.machine.default_hstate.nr_overcommit_huge_pages == 0


# -- docs/importing.md ------------------------------------------------------------------

TEXT = (Path(__file__).parent.parent / "docs" / "importing.md").read_text(encoding="utf-8")


def test_the_scenario_of_the_docs(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```toml\n(.*?)^```", TEXT, re.M | re.S)
    (tmp_path / "machine.json").write_text(as_json(Collected("test", machine(2, gib=1))))
    (tmp_path / "scenario.toml").write_text(text)
    result = CliRunner().invoke(main, ["run", str(tmp_path / "scenario.toml")])
    assert result.exit_code == 0, result.output
    assert "memory33/state" in result.output


@pytest.mark.skipif(
    not os.access("/proc/pagetypeinfo", os.R_OK) or not os.path.exists("/proc/iomem"),
    reason="not privileged on a Linux host",
)
def test_the_command_of_the_docs_collects_this_host(tmp_path: Path) -> None:
    (line,) = re.findall(r"^    (mkdir twin;.*)$", TEXT, re.M)
    subprocess.run(["bash", "-c", line], cwd=tmp_path, check=True, timeout=100)
    collected = collect(tmp_path / "twin.tar.gz")
    there = collect("/").files
    assert collected.files.keys() <= there.keys()
    for path in ("/proc/iomem", "/proc/cmdline", MEMORY + "block_size_bytes", NODE + "online"):
        assert collected.files.get(path) == there.get(path)
    assert collected.files["/proc/zoneinfo"].startswith("Node 0, zone")
    if MEMORY + "memory0/state" in there:
        # Which block the host's daemons switch while this runs is theirs.
        assert collected.files[MEMORY + "memory0/state"] == there[MEMORY + "memory0/state"]


# -- anything at all --------------------------------------------------------------------


@quick
@given(st.data())
def test_a_twin_of_spoilt_files(data: st.DataObject) -> None:
    files = spoil(data.draw, spoil(data.draw, recorded("movable_node")))
    text = json.dumps({"format": "kmm machine", "version": 1, "files": files})
    check_outcome(text.encode(), "machine.json")


@quick
@given(st.data())
def test_a_spoilt_machine_json(data: st.DataObject) -> None:
    whole = json.loads(as_json(Collected("test", recorded("unaligned"))))
    check_outcome(json.dumps(spoil(data.draw, whole)).encode(), "machine.json")


@quick
@given(st.binary(max_size=20), st.floats(0, 1), st.sampled_from(["w", "w:gz", "w:xz", "w:bz2"]))
def test_a_spoilt_archive(tmp_path: Path, junk: bytes, where: float, mode: str) -> None:
    path = tmp_path / f"good-{mode[2:]}"
    if not path.exists():
        archive(path, recorded("unaligned"), mode=mode)
    data = path.read_bytes()
    at = int(where * len(data))
    check_outcome(data[:at] + junk + data[at + len(junk) :], "saved.tar")


def check_outcome(data: bytes, name: str) -> None:
    """A machine that holds together, or one line that names the file; never a traceback."""
    with tempfile.TemporaryDirectory() as there:
        path = Path(there, name)
        path.write_bytes(data)
        result = CliRunner().invoke(main, ["import", str(path), "-o", f"{there}/machine.json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 1, 2)
    if result.exit_code == 2:
        message = result.output.split("Error: ")[1].strip()
        assert name in message and "\n" not in message and len(message) < 700
