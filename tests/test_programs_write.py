"""Programs that change memory run unchanged: on two nodes with four DIMMs, blocks 32 to 47."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kmm.params import GiB, MiB
from tests.programs import PATH, REQUIRED, SHADOWED, environment, missing, need_fuse, program
from tests.test_programs import DISTANCES

MEMORY = "/sys/devices/system/memory"
PARTLY = 64  # chmem's status when not all that was asked for could be done

NODES = [{"cpus": "0-1", "memory": "1G"}, {"cpus": "2-3", "memory": "1G"}]
DIMMS = [
    {"op": "plug", "id": f"d{i}", "node": i // 2, "addr": 4 * GiB + i * 512 * MiB, "size": "512M"}
    for i in range(4)
]


def write(block: int, word: str) -> dict[str, object]:
    return {"op": "write", "path": f"{MEMORY}/memory{block}/state", "value": word}


@pytest.fixture
def inside(tmp_path: Path):
    """Run a shell script on a machine; what it prints, what blocks are online, and its status."""

    def run(
        script: str, *steps: dict[str, object], nodes: list[dict[str, object]] | None = None
    ) -> tuple[str, set[int], int]:
        need_fuse()
        machine = {"memory": "2G", "maxmem": "16G", "cpus": 4, "nodes": nodes or NODES}
        if nodes is None:
            machine["distances"] = DISTANCES
        file = tmp_path / "scenario.json"
        file.write_text(json.dumps({"machine": machine, "steps": steps}))
        shadows = "\n".join(f"{name}() {{ false; }}" for name in SHADOWED)
        end = f"""
            status=$?
            echo @@ $(cat $KMM_DIR/.kmm/validate)
            for d in {MEMORY}/memory*; do echo @@ $(cat $d/phys_index $d/state); done
            exit $status"""
        command = ["bash", "-c", f"exec 2>&1\n{shadows}\n{script}\n{end}"]
        kmm = [sys.executable, "-m", "kmm", "shell", "--scenario", str(file), "--", *command]
        paths = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        done = subprocess.run(
            kmm, capture_output=True, text=True, timeout=120, env=environment(**paths)
        )
        lines = done.stdout.splitlines()
        if "@@ ok" not in lines and "nothing was started" in done.stderr + done.stdout:
            missing(done.stderr.strip())
        assert "@@ ok" in lines, (done.stdout, done.stderr)
        rows = [line.split()[1:] for line in lines if line.startswith("@@ ") and line != "@@ ok"]
        online = {int(number, 16) for number, state in rows if state == "online"}
        assert len(rows) >= 16
        said = "\n".join(line for line in lines if not line.startswith("@@ "))
        return said, {b for b in online if b >= 32}, done.returncode

    return run


@pytest.mark.parametrize(
    ("line", "online", "said"),
    [
        ("chmem -v -e 512M", range(32, 36), "Memory Block 35"),
        ("chmem -e 300M", (), "Size must be aligned to memory block size (128M)"),
        ("chmem -b -e 33-34", (33, 34), ""),
        ("chmem -e 0x108000000-0x117ffffff", (33, 34), ""),
        ("chmem -e 0x0000000120000000-0x000000013fffffff", range(36, 40), ""),
        ("chmem -z Movable -b -e 32", (32,), ""),
        ("chmem -z Normal -b -e 40-41", (40, 41), ""),
        ("chmem -b -e 90", (), ""),
        ("chmem -z DMA32 -b -e 40", (), "enable failed: Zone mismatch"),
    ],
)
def test_chmem_enables(inside, line: str, online, said: str) -> None:
    out, have, status = inside(line, *DIMMS)
    assert have == set(online), out
    assert said.casefold() in out.casefold()
    assert (status == 0) == bool(online)


def test_chmem_puts_a_block_in_the_zone_that_it_is_told(inside) -> None:
    script = f"""
        chmem -z Movable -b -e 32 && chmem -z Normal -b -e 33
        cat {MEMORY}/memory32/valid_zones {MEMORY}/memory33/valid_zones"""
    out, online, _ = inside(script, *DIMMS)
    assert out.split() == ["Movable", "Normal"]
    assert online == {32, 33}


@pytest.mark.parametrize(
    ("line", "online"),
    [
        ("chmem -d 256M", range(32, 40)),  # from the highest down, whatever the node
        ("chmem -b -d 32-33", (*range(34, 40), 40, 41)),
        ("chmem -d 0x100000000-0x107ffffff", range(33, 42)),
    ],
)
def test_chmem_disables(inside, line: str, online) -> None:
    up = [write(b, "online_movable") for b in range(32, 42)]
    out, have, status = inside(line, *DIMMS, *up)
    assert (have, status) == (set(online), 0), out


def test_chmem_tells_which_block_is_busy_and_that_only_part_was_done(inside) -> None:
    # The kernel's own pages: 40 is the one block of node 1's Normal zone.
    slabs = {"op": "alloc", "id": "s", "count": 40_000, "gfp": "GFP_KERNEL", "node": 1}
    steps = [*DIMMS, write(40, "online_kernel"), slabs, write(41, "online_movable")]
    out, online, status = inside("chmem -b -d 40", *steps)
    assert "Memory Block 40 (0x0000000140000000-0x0000000147ffffff) disable failed" in out
    assert (online, status != 0) == ({40, 41}, True)
    out, online, status = inside("chmem -v -b -d 40-41", *steps)
    assert (online, status) == ({40}, PARTLY), out
    assert "disable failed" in out and "disabled" in out


def test_chmem_disables_by_size_what_goes(inside) -> None:
    slabs = {"op": "alloc", "id": "s", "count": 40_000, "gfp": "GFP_KERNEL", "node": 1}
    steps = [*DIMMS, write(40, "online_kernel"), slabs, write(41, "online_movable")]
    out, online, _ = inside("chmem -d 256M", *steps)
    # 41 first, then 40 stays, and so it goes on below the DIMMs.
    assert 41 not in online and 40 in online, out


SCRIPT = f"""
set -u
online() {{
    for d in {MEMORY}/memory*; do
        [ "$(cat $d/state)" = offline ] || continue
        if ! echo online_movable > $d/state; then echo "$d: stays offline"; fi
    done
}}
offline() {{
    # Whatever is refused comes back as a line, and the rest goes on.
    for n in "$@"; do
        said=$( {{ echo offline > {MEMORY}/memory$n/state; }} 2>&1 ) && echo "$n went" && continue
        case $said in
            *"Device or resource busy"*) echo "$n busy" ;;
            *"No such file"*|*"Permission denied"*) echo "$n missing" ;;
            *"Invalid argument"*) echo "$n was offline" ;;
            *) echo "$n: $said" ;;
        esac
    done
}}
online
offline 32 40 32 99
echo nonsense > {MEMORY}/memory33/state || echo refused
"""


def test_a_shell_script_that_reacts_to_errors(inside) -> None:
    slabs = {"op": "alloc", "id": "s", "count": 40_000, "gfp": "GFP_KERNEL", "node": 1}
    out, online, status = inside(SCRIPT, *DIMMS, write(40, "online_kernel"), slabs)
    words = [line for line in out.splitlines() if "write error" not in line]
    assert words == ["32 went", "40 busy", "32 was offline", "99 missing", "refused"], out
    assert online == set(range(33, 48))
    assert status == 0


def test_daxctl_makes_ram_of_a_device_and_back(inside) -> None:
    program("daxctl")
    script = """
        daxctl list
        daxctl reconfigure-device -m system-ram --no-online dax0.0 && echo first
        daxctl online-memory dax0.0 && echo second
        lsmem -n -r -o RANGE,STATE --summary=never
        daxctl list
        daxctl offline-memory dax0.0 && echo third
        daxctl reconfigure-device -m devdax dax0.0 && echo fourth"""
    nodes = [{"memory": "2G"}, {"soft_reserved": "512M"}]
    out, online, status = inside(script, nodes=nodes)
    if '"chardev"' not in out:
        missing("no right to make device nodes")
    assert status == 0, out
    assert [w for w in out.split() if w in ("first", "second", "third", "fourth")] == [
        "first",
        "second",
        "third",
        "fourth",
    ]
    modes = [line.split(":")[1].strip('",') for line in out.splitlines() if '"mode"' in line]
    assert modes == ["devdax", "system-ram", "system-ram", "devdax", "devdax"][: len(modes)]
    assert "0x0000000100000000-0x000000011fffffff online" in out
    assert '"online_memblocks":4' in out and '"movable":true' in out
    assert not online


def test_the_readers_follow_what_was_written(inside) -> None:
    script = """
        numactl -H | grep "node 1 size"; free -m | grep Mem
        chmem -b -e 40-47
        numactl -H | grep "node 1 size"; free -m | grep Mem
        lsmem -n -r -o RANGE,STATE,BLOCK --summary=never"""
    for name in ("numactl", "free", "lsmem"):
        program(name)
    out, online, _ = inside(script, *DIMMS)
    rows = [line.split() for line in out.splitlines()]
    assert int(rows[2][3]) - int(rows[0][3]) == 1024
    assert int(rows[3][1]) - int(rows[1][1]) == 1024
    assert rows[4:] == [
        ["0x0000000000000000-0x000000007fffffff", "online", "0-15"],
        ["0x0000000100000000-0x000000013fffffff", "offline", "32-39"],
        ["0x0000000140000000-0x000000017fffffff", "online", "40-47"],
    ]
    assert online == set(range(40, 48))


def test_hugeadm_and_sysctl(inside) -> None:
    for name in ("hugeadm", "sysctl"):
        program(name)
    script = """
        sysctl -q vm.nr_hugepages=10 vm.max_map_count=70000
        hugeadm --pool-pages-min 2M:20 2>/dev/null; hugeadm --pool-list
        hugeadm --pool-pages-min 2M:-5 2>/dev/null; grep HugePages_Total /proc/meminfo
        hugeadm --thp-never; cat /sys/kernel/mm/transparent_hugepage/enabled
        sysctl -n vm.max_map_count vm.page-cluster vm.numa_zonelist_order
        sysctl vm.overcommit_ratio=-0 vm.dirty_bytes=1 2>&1"""
    out, _, status = inside(script, *DIMMS)
    rows = [line.split() for line in out.splitlines()]
    assert rows[1] == ["2097152", "20", "20", "20", "*"], out
    assert rows[3:8] == [
        ["HugePages_Total:", "15"],
        ["always", "madvise", "[never]"],
        ["70000"],
        ["3"],
        ["Node"],
    ]
    assert "Invalid argument" in out and status != 0


# What the kernel's own test of memory hot-plug asks of it: what is removable goes and comes back,
# a state that it is in already is refused, and so is what a notifier vetoes.
ON_OFF = f"""
inject=$KMM_DIR/sys/kernel/debug/notifier-error-inject/memory/actions
try() {{ {{ echo $2 > {MEMORY}/memory$1/state; }} 2>/dev/null && echo ok || echo no; }}
movable=$(grep -lx Movable {MEMORY}/memory*/valid_zones | grep -o 'memory[0-9]*/' | tr -dc '0-9\n')
for b in $movable; do
    grep -q 1 {MEMORY}/memory$b/removable && echo $(try $b offline) $(cat {MEMORY}/memory$b/state)
done
echo -12 > $inject/MEM_GOING_ONLINE/error
for b in $movable; do echo $(try $b online_movable) $(cat {MEMORY}/memory$b/state); done
echo 0 > $inject/MEM_GOING_ONLINE/error
for b in $movable; do echo $(try $b online_movable) $(cat {MEMORY}/memory$b/state); done
echo -16 > $inject/MEM_GOING_OFFLINE/error
for b in $movable; do echo $(try $b offline) $(try $b online) $(cat {MEMORY}/memory$b/state); done
echo 0 > $inject/MEM_GOING_OFFLINE/error
"""


def test_the_calls_of_the_kernels_own_test(inside) -> None:
    up = [write(b, "online_movable") for b in (36, 37, 40)]
    out, online, _ = inside(ON_OFF, *DIMMS, *up)
    assert out.splitlines() == [
        *["ok offline"] * 3,
        *["no offline"] * 3,
        *["ok online"] * 3,
        *["no no online"] * 3,
    ]
    assert online == {36, 37, 40}


def test_stress_ng(inside) -> None:
    if shutil.which("stress-ng", path=PATH) is None:
        pytest.skip("stress-ng is not installed, nor in CI: a graphics stack comes with it")
    up = [write(b, "online_movable") for b in range(36, 48)]
    line = "cd /tmp && stress-ng --memhotplug 1 --memhotplug-ops 50 --metrics"
    out, _, status = inside(line, *DIMMS, *up)
    assert status == 0
    assert "per offline action" in out and "successful run completed" in out


def test_nothing_is_skipped_where_all_has_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match="no-such-program is not installed"):
        program("no-such-program")
    monkeypatch.delenv(REQUIRED)
    with pytest.raises(pytest.skip.Exception):
        program("no-such-program")
