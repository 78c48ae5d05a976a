"""Programs that were written for a real machine read a machine of two nodes and four DIMMs."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from kmm import Machine
from kmm.export import export_tree
from kmm.params import GiB, MachineConfig, MiB
from tests.programs import environment, missing, over, program, run

MEMORY, NODE = "/sys/devices/system/memory", "/sys/devices/system/node"
DISTANCES = [[10, 21], [21, 10]]


def four_dimms(**node: object) -> Machine:
    """Two nodes of 1 GiB and two CPUs each, with two DIMMs of 512 MiB each."""
    config = {
        "memory": "2G",
        "maxmem": "16G",
        "cpus": 4,
        "nodes": [{"cpus": "0-1", "memory": "1G"}, {"cpus": "2-3", "memory": "1G", **node}],
        "distances": DISTANCES,
    }
    m = Machine(MachineConfig.from_dict(config))
    base = 5 * GiB if node else 4 * GiB
    for i in range(4):
        m.plug(f"dimm{i}", i // 2, base + i * 512 * MiB, 512 * MiB)
    return m


def block(number: int) -> str:
    return f"{MEMORY}/memory{number}/state"


@pytest.fixture(scope="module")
def machine() -> Machine:
    """One DIMM in Normal, one in Movable, one half in use, and one offline; blocks 32 to 47."""
    m = four_dimms()
    for number in range(32, 36):
        m.write(block(number), "online_kernel")
    for number in range(36, 42):
        m.write(block(number), "online_movable")
    m.alloc_pages_bulk(1000, nid=1)
    return m


@pytest.fixture(scope="module")
def tree(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("export") / "tree"
    export_tree(machine, where)
    return where


def kib(m: Machine, name: str) -> int:
    found = re.search(rf"^{re.escape(name)}: +([0-9]+) kB$", m.read("/proc/meminfo"), re.M)
    assert found, name
    return int(found[1])


def mib(pages: int) -> int:
    return pages * 4096 // MiB


def ranges(text: str) -> list[tuple[str, str]]:
    """State and numbers of lsmem's rows, of blocks that follow each other and are alike."""
    return [(row[1], row[2]) for row in (line.split() for line in text.splitlines())]


@pytest.mark.parametrize("how", ["sysroot", "bound"])
def test_lsmem(tree: Path, how: str) -> None:
    lsmem = [program("lsmem"), "-n", "-r", "-o", "RANGE,STATE,BLOCK"]
    text = over(tree, lsmem) if how == "bound" else run([*lsmem, "--sysroot", str(tree)]).stdout
    assert ranges(text.partition("\n\n")[0]) == [
        ("online", "0-15"),
        ("online", "32-41"),
        ("offline", "42-47"),
    ]
    total = run([program("lsmem"), "--summary=only", "--bytes", "--sysroot", str(tree)]).stdout
    numbers = [int(n) for n in re.findall(r": +([0-9]+)$", total, re.M)]
    assert numbers == [128 * MiB, 26 * 128 * MiB, 6 * 128 * MiB]


def test_lsmem_tells_each_blocks_node_and_zone(machine: Machine, tree: Path) -> None:
    columns = ["-a", "-n", "-r", "--summary=never", "-o", "BLOCK,NODE,ZONES,STATE"]
    text = run([program("lsmem"), *columns, "--sysroot", str(tree)]).stdout
    rows = dict(line.split(None, 1) for line in text.splitlines())
    assert len(rows) == 32
    for number, block_ in machine.memory_blocks.items():
        node, zones, state = rows[str(number)].split()
        assert int(node) in block_.nodes
        assert state == block_.state
        shown = machine.read(f"{MEMORY}/memory{number}/valid_zones").split()
        assert zones.split("/") == [z.capitalize() if z == "none" else z for z in shown]


def test_numactl(machine: Machine, tree: Path) -> None:
    text = over(tree, [program("numactl"), "--hardware"])
    assert text.startswith("available: 2 nodes (0-1)\n")
    for nid, pgdat in machine.nodes.items():
        cpus = " ".join(str(c) for c in machine.cpus_of_node(nid))
        assert f"node {nid} cpus: {cpus}\n" in text
        assert f"node {nid} size: {mib(pgdat.managed_pages)} MB\n" in text
        free = sum(z.nr_free_pages for z in pgdat.zones)
        assert f"node {nid} free: {mib(free)} MB\n" in text
        assert f"  {nid}:  {'  '.join(str(d) for d in DISTANCES[nid])} \n" in text


def test_numastat(machine: Machine, tree: Path) -> None:
    rows = [line.split() for line in over(tree, [program("numastat")]).splitlines()]
    assert rows[0] == ["node0", "node1"]
    of_node = [
        dict(line.split() for line in machine.read(f"{NODE}/node{n}/numastat").splitlines())
        for n in (0, 1)
    ]
    assert len(rows) == 7
    for name, *counts in rows[1:]:
        assert counts == [of_node[0][name], of_node[1][name]], name
    assert int(of_node[1]["numa_hit"]) >= 1000


def test_numastat_of_memory(machine: Machine, tree: Path) -> None:
    text = over(tree, [program("numastat"), "-m"])
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.count(".") == 3}
    want = [p.managed_pages * 4096 / MiB for p in machine.nodes.values()]
    assert rows["MemTotal"] == [f"{n:.2f}" for n in (*want, sum(want))]
    used = [float(n) for n in rows["MemUsed"]]
    assert used[2] == pytest.approx(used[0] + used[1], abs=0.02)


def test_free(machine: Machine, tree: Path) -> None:
    rows = [line.split() for line in over(tree, [program("free"), "-k"]).splitlines()]
    total, free = kib(machine, "MemTotal"), kib(machine, "MemFree")
    assert rows[1][0] == "Mem:"
    assert [int(rows[1][1]), int(rows[1][3])] == [total, free]
    assert int(rows[1][6]) == kib(machine, "MemAvailable")


def test_vmstat(machine: Machine, tree: Path) -> None:
    text = over(tree, [program("vmstat"), "-s"])
    assert re.search(rf"^ *{kib(machine, 'MemTotal')} K total memory$", text, re.M)
    assert re.search(rf"^ *{kib(machine, 'MemFree')} K free memory$", text, re.M)


def test_top(machine: Machine, tree: Path) -> None:
    text = over(tree, [program("top"), "-b", "-n", "1", "-E", "k"])
    found = re.search(r"^KiB Mem : +([0-9.]+) total, +([0-9.]+) free", text, re.M)
    assert found
    assert [float(n) for n in found.groups()] == [kib(machine, "MemTotal"), kib(machine, "MemFree")]


def test_sar(machine: Machine, tree: Path) -> None:
    sar = [program("sar"), "-r", "ALL", "-H", "-S", "-B", "-W", "1", "1"]
    rows = [line.split()[1:] for line in over(tree, sar).splitlines() if line[:7] == "Average"]
    tables = {names[0]: dict(zip(names, row, strict=True)) for names, row in sar_tables(rows)}
    memory = tables["kbmemfree"]
    assert int(memory["kbmemfree"]) == kib(machine, "MemFree")
    assert int(memory["kbavail"]) == kib(machine, "MemAvailable")
    assert int(tables["kbswpfree"]["kbswpused"]) == 0
    assert tables["kbhugfree"]["%hugused"] == "0.00"
    assert float(tables["pgpgin/s"]["fault/s"]) == 0


def sar_tables(rows: list[list[str]]) -> list[tuple[list[str], list[str]]]:
    """The names of the columns of each table that sar prints, and its one row."""
    return list(zip(rows[::2], rows[1::2], strict=True))


def test_numad_finds_the_node_with_room(machine: Machine, tree: Path) -> None:
    free = [
        int(machine.read(f"{NODE}/node{nid}/meminfo").split("MemFree:")[1].split()[0]) >> 10
        for nid in (0, 1)
    ]
    # No CPU is asked for, and nothing near what a node has: how idle the host's CPUs are also
    # counts for numad.
    small, large = (
        over(tree, [program("numad"), "-S", "0", "-w", f"0:{size}"]).strip()
        for size in (min(free) // 2, sum(free))
    )
    assert (small in ("0", "1"), large) == (True, "0-1"), free


def test_lsmem_in_every_format(machine: Machine, tree: Path) -> None:
    lsmem = [program("lsmem"), "--sysroot", str(tree), "-o", "RANGE,STATE,NODE,BLOCK"]
    rows = json.loads(run([*lsmem, "--json"]).stdout)["memory"]
    assert [(row["state"], row["block"]) for row in rows if row["node"] == 1] == [
        ("online", "8-15"),
        ("online", "40-41"),
        ("offline", "42-47"),
    ]
    pairs = run([*lsmem, "--pairs"]).stdout.splitlines()
    assert [line.split('BLOCK="')[1].strip('"') for line in pairs] == [r["block"] for r in rows]
    split = run([*lsmem, "--split", "STATE", "--summary=never", "-n", "-r"]).stdout
    assert [line.split()[-1] for line in split.splitlines()] == ["0-15", "32-41", "42-47"]


@pytest.mark.parametrize("kind", ["zoneinfo", "buddyinfo", "meminfo", "meminfo_numa", "vmstat"])
def test_node_exporter(machine: Machine, tree: Path, kind: str) -> None:
    series = scrape(tree, kind)
    assert series[f'node_scrape_collector_success{{collector="{kind}"}}'] == 1
    pages = {(z.nid, z.name): z for z in machine.all_zones() if z.populated}
    if kind == "zoneinfo":
        for (nid, name), zone in pages.items():
            where = f'{{node="{nid}",zone="{name}"}}'
            assert series[f"node_zoneinfo_present_pages{where}"] == zone.present_pages
            assert series[f"node_zoneinfo_nr_free_pages{where}"] == zone.nr_free_pages
            assert series[f"node_zoneinfo_min_pages{where}"] == zone.min_wmark_pages()
    elif kind == "buddyinfo":
        for (nid, name), zone in pages.items():
            for order, count in enumerate(zone.nr_free()):
                where = f'{{node="{nid}",size="{order}",zone="{name}"}}'
                assert series[f"node_buddyinfo_blocks{where}"] == count
        assert sum(s.startswith("node_buddyinfo") for s in series) == 11 * len(pages)
    elif kind == "meminfo":
        assert series["node_memory_MemTotal_bytes"] == kib(machine, "MemTotal") * 1024
        assert series["node_memory_DirectMap2M_bytes"] == kib(machine, "DirectMap2M") * 1024
    elif kind == "meminfo_numa":
        for nid, pgdat in machine.nodes.items():
            name = f'node_memory_numa_MemTotal{{node="{nid}"}}'
            assert series[name] == pgdat.managed_pages * 4096
        assert series['node_memory_numa_numa_hit_total{node="1"}'] >= 1000
    else:
        assert series["node_vmstat_pgfault"] == 0


def scrape(tree: Path, kind: str) -> dict[str, float]:
    """Return the series of one collector."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        program("prometheus-node-exporter"),
        "--collector.disable-defaults",
        f"--collector.{kind}",
        f"--path.procfs={tree}/proc",
        f"--path.sysfs={tree}/sys",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    server = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        text = ""
        for _ in range(200):
            assert server.poll() is None
            try:
                text = direct.open(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
                break
            except OSError:
                time.sleep(0.05)
    finally:
        server.terminate()
        server.wait()
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("node_")]
    assert lines
    return {name: float(value) for name, value in lines}


def test_lstopo(machine: Machine, tree: Path) -> None:
    alone = {"HWLOC_FSROOT": str(tree), "HWLOC_COMPONENTS": "linux,stop", "HWLOC_THISSYSTEM": "0"}
    text = run([program("lstopo-no-graphics")], **alone).stdout
    for nid, pgdat in machine.nodes.items():
        size = round(pgdat.managed_pages * 4 / 1024)
        assert f"NUMANode L#{nid} (P#{nid} {size}MB)" in text
    assert re.findall(r"PU L#([0-9])", text) == ["0", "1", "2", "3"]
    xml = run([program("lstopo-no-graphics"), "--of", "xml"], **alone).stdout
    assert re.findall(r'<u64values length="12">([0-9 ]+)', xml) == ["10 21 21 10 "]
    text = run([program("hwloc-info")], **alone).stdout
    assert re.search(r"2 NUMANode", text)


@pytest.fixture(scope="module")
def dax_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A device of 512 MiB, of which kmem has made RAM of node 1."""
    m = four_dimms(soft_reserved="512M")
    m.write("/sys/bus/dax/drivers/device_dax/unbind", "dax0.0")
    m.write("/sys/bus/dax/drivers/kmem/new_id", "dax0.0")
    for number in range(32, 36):
        m.write(block(number), "online_movable")
    where = tmp_path_factory.mktemp("dax") / "tree"
    export_tree(m, where)
    return where


def test_daxctl_list(dax_tree: Path) -> None:
    daxctl = program("daxctl")
    node = "rm -f $0; mknod $0 c 252 0; "  # of the host, which the kernel's devtmpfs would make
    script = f'mount -t tmpfs none /dev; {node} exec "$@"'
    command = ["/bin/sh", "-c", script, "/dev/dax0.0", daxctl, "list", "-R", "-D"]
    said = over(dax_tree, command, whole=True)
    device = {"chardev": "dax0.0", "size": 512 * MiB, "target_node": 1, "align": 2 * MiB}
    device |= {"mode": "system-ram", "online_memblocks": 4, "total_memblocks": 4, "movable": True}
    region = json.loads(said)
    region = region[0] if isinstance(region, list) else region
    assert region["path"] == "/platform/hmem.0"
    assert region["size"] == 512 * MiB
    assert region["devices"] == [device]


def test_find_and_grep_and_a_library(machine: Machine, tree: Path) -> None:
    found = run([program("find"), str(tree), "-name", "state", "-path", "*memory/memory*"]).stdout
    assert len(found.split()) == 32
    states = run([program("grep"), "-rl", "--include=state", "^offline$", f"{tree}{MEMORY}"]).stdout
    assert len(states.split()) == 6
    assert run([program("find"), str(tree), "-xtype", "l"]).stdout == ""
    try:
        import psutil
    except ImportError:
        missing("psutil is not installed")
    before, psutil.PROCFS_PATH = psutil.PROCFS_PATH, f"{tree}/proc"
    try:
        memory = psutil.virtual_memory()
        assert memory.total == kib(machine, "MemTotal") * 1024
        assert memory.free == kib(machine, "MemFree") * 1024
        assert memory.available == kib(machine, "MemAvailable") * 1024
        assert psutil.swap_memory().total == 0
    finally:
        psutil.PROCFS_PATH = before
