"""RAM of boot and RAM of later in a machine that was saved in the middle of its life."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kmm import ConfigError, Machine
from kmm.boot import system_ram
from kmm.boot_ram import added_later, parse_memmap, split_memmap
from kmm.from_files import read_tree
from kmm.replay import boot_machine, check_recording, play_step, snapshot_files
from kmm.saved_machine import parse_saved
from kmm.sparse import SECTION_IS_EARLY
from tests.conftest import DIMM, RECORDINGS, recording

MEMMAP = "/sys/firmware/memmap/"
RAM, GONE = "System RAM", "Reserved"


def saved(m: Machine) -> dict[str, str]:
    """The files of a machine with its firmware map."""
    files = snapshot_files(m)
    for number in m.listdir(MEMMAP):
        for name in ("start", "end", "type"):
            files[f"{MEMMAP}{number}/{name}"] = m.read(f"{MEMMAP}{number}/{name}").strip()
    return files


def account(m: Machine) -> dict[str, Any]:
    """What depends on which memory was there at boot."""
    flags = m.sections["flags"]
    ranges: list[tuple[int, int, int]] = []
    for start, end, nid in m.numa_meminfo:
        ram = [(p << 12, (p + n) << 12) for p, n in boot_ram(m)]
        ranges += [(max(s, start), min(e, end), nid) for s, e in ram if s < end and start < e]
    return {
        "early": [(z.index, z.present_early_pages) for z in m.all_zones()],
        "sections": [(int(s), int(flags[s])) for s in flags.nonzero()[0]],
        "nodes": whole(ranges),
        "map": sorted(m.firmware_map.values()),
    }


def boot_ram(m: Machine) -> list[tuple[int, int]]:
    return [(p, n) for p, n in system_ram(m) if m.section_flags(p) & SECTION_IS_EARLY]


def whole(ranges: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    out: list[tuple[int, int, int]] = []
    for start, end, nid in sorted(ranges):
        if out and (out[-1][1], out[-1][2]) == (start, nid):
            out[-1] = (out[-1][0], end, nid)
        else:
            out.append((start, end, nid))
    return out


@pytest.mark.parametrize("with_map", [True, False])
@pytest.mark.parametrize("name", ["kernel_zone", "early_blocks", "four_nodes", "memmap_on_memory"])
def test_a_machine_saved_at_any_step_knows_its_boot_memory(name: str, with_map: bool) -> None:
    real = recording(name)
    check_recording(real, name)
    m = boot_machine(real)
    for entry in real["steps"][1:]:
        play_step(m, entry["step"])
        files = saved(m) if with_map else snapshot_files(m)
        again = Machine.from_files(files, real["machine"])
        assert account(again) == account(m)
        # The files do not tell of memory that was plugged in and is gone.
        assert again.max_pfn <= m.max_pfn
        if with_map:
            assert again.firmware_map == m.firmware_map
        again.validate()


@pytest.mark.parametrize("name", sorted(p.stem for p in RECORDINGS.glob("*.json")))
def test_lines_of_iomem_alone_tell_what_came_after_boot(name: str) -> None:
    """In every step of every recording; no RAM is taken for later at boot."""
    steps = [s["files"] for s in recording(name)["steps"] if "files" in s]
    if name == "load_again":
        del steps[-1]  # it was read while a block was on its way out: files contradict each other
    boot = {line for line in steps[0]["/proc/iomem"].split("\n") if line.endswith(RAM)}
    for files in steps:
        with_memmap = files["/sys/module/memory_hotplug/parameters/memmap_on_memory"] == "Y"
        later = added_later(parse_saved(files), {}, [], 512 if with_memmap else 0)
        shown = {f"{r.start:08x}-{r.end:08x} : {RAM}" for r in later}
        lines = {line for line in files["/proc/iomem"].split("\n") if line.endswith(RAM)}
        assert shown == lines - boot


@pytest.mark.parametrize(
    ("entries", "firmware", "hot"),
    [
        ({}, 0, 0),
        # A hot-added range comes after kinds that lie above it.
        ({0: (0, 9, RAM), 1: (90, 99, GONE), 2: (10, 19, RAM)}, 2, 1),
        # Above all else it could be firmware's: neither.
        ({0: (0, 9, RAM), 1: (10, 19, GONE), 2: (40, 49, RAM)}, 2, 0),
        # A gap in the numbers is an entry that was removed again.
        ({0: (0, 9, RAM), 1: (10, 19, GONE), 4: (40, 49, RAM)}, 2, 1),
        # Firmware's neighbours would be one.
        ({0: (0, 9, RAM), 1: (20, 29, GONE), 2: (40, 49, RAM), 3: (50, 59, RAM)}, 2, 1),
        ({0: (0, 9, RAM), 1: (10, 19, RAM)}, 1, 1),
    ],
)
def test_firmware_lists_its_ranges_before_hot_plug_does(
    entries: dict[int, tuple[int, int, str]], firmware: int, hot: int
) -> None:
    sure, added = split_memmap(entries)
    assert sure == [e for _, e in sorted(entries.items())][:firmware]
    assert added == [e for _, e in sorted(entries.items())][len(entries) - hot :]


@pytest.mark.parametrize(
    ("name", "text"), [("start", "4096"), ("end", ""), ("start", "0x" + "f" * 17)]
)
def test_a_bad_map_is_named(name: str, text: str) -> None:
    files = {f"{MEMMAP}3/start": "0x0", f"{MEMMAP}3/end": "0xfff", f"{MEMMAP}3/type": RAM}
    with pytest.raises(ConfigError, match=f"{MEMMAP}3/{name}: .*; allowed: a number like"):
        parse_memmap({**files, f"{MEMMAP}3/{name}": text})


def test_without_a_description_the_map_is_what_iomem_shows() -> None:
    files = recording("kernel_zone")["steps"][4]["files"]
    m = Machine.from_files(files)
    shown = [e for e in m.firmware_map.values() if e[2] == RAM]
    assert shown[:2] == [(0x1000, 0x9FBFF, RAM), (0x100000, 0x3FFDFFFF, RAM)]
    assert all(start >= 1 << 32 for start, _, _ in shown[2:])
    assert m.config.memory == sum(n.memory for n in m.config.nodes) == 262014 << 12
    m.validate()


def test_a_saved_directory_has_the_map(tmp_path: Path) -> None:
    m = boot_machine(recording("kernel_zone"))
    m.plug("a", 1, DIMM, 128 << 20)
    for path, text in saved(m).items():
        if path != "kthreads":
            target = tmp_path / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
    again = Machine.from_files(read_tree(tmp_path))
    assert again.firmware_map == m.firmware_map
    assert again.numa_meminfo[-1][1] <= DIMM
    again.validate()
