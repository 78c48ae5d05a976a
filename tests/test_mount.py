"""A mounted machine as programs see it, and how mounting fails and ends."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kmm import Machine
from kmm import mount as mount_module
from kmm.machine_source import chosen_player, player_of
from kmm.mount import Mounted, MountError, mounted, mounts, start
from kmm.mount import check_fuse as check
from kmm.mount import end as unmount_and_wait
from kmm.saved_texts import SavedText
from kmm.scenario import load_scenario
from kmm.sysfs import stat as tree_stat
from tests.conftest import RECORDINGS, two_nodes
from tests.fuse import MACHINE, needs_fuse, sh
from tests.hammer import hammer

pytestmark = needs_fuse
MEMORY, NODE = "/sys/devices/system/memory", "/sys/devices/system/node"
EXAMPLE = Path(__file__).parent.parent / "examples" / "first_dimm.toml"


@pytest.fixture(scope="module")
def shared() -> Iterator[Mounted]:
    """A machine that tests leave as they found it: a DIMM of four blocks, offline."""
    with mounted(MACHINE) as k:
        k.plug("d", 1, 1 << 32, 512 << 20)
        yield k
        k.validate()


def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def _waits_for_a_reply(pid: int) -> bool:
    """Whether a ``cat`` sleeps with its file open."""
    sleeps = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"
    return sleeps and os.path.lexists(f"/proc/{pid}/fd/3")


def refusal(call: object, *args: object) -> int:
    with pytest.raises(OSError) as e:
        call(*args)  # type: ignore[operator]
    return e.value.errno or 0


def test_modes_sizes_and_links(shared: Mounted) -> None:
    state = shared.file(f"{MEMORY}/memory32/state")
    assert stat.S_IMODE(state.stat().st_mode) == 0o644
    assert state.stat().st_size == 4096
    assert shared.file("/proc/zoneinfo").stat().st_size == 0
    assert os.readlink(shared.file(f"{MEMORY}/memory32/node1")) == "../../node/node1"
    assert shared.file(f"{MEMORY}/memory32/node1/meminfo").read_text().startswith("Node 1")
    assert sh(f"find {shared.path} -xdev -type l ! -exec test -e {{}} ';' -print").stdout == ""
    assert os.statvfs(shared.path).f_namemax == 255


def test_modes_and_owners_can_be_set_and_go_with_what_they_are_of() -> None:
    with mounted(MACHINE) as k:
        pool = k.file("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
        own = pool.stat()
        os.chmod(pool, 0o664)
        assert stat.S_IMODE(pool.stat().st_mode) == 0o664
        if os.geteuid() == 0:
            os.chown(pool, -1, 12)
            assert (pool.stat().st_uid, pool.stat().st_gid) == (0, 12)
            os.chown(pool, own.st_uid, own.st_gid)
        os.chmod(pool, 0o644)
        assert refusal(os.chmod, k.file("/proc/sys/vm/swappiness"), 0o600) == errno.EPERM
        k.plug("passing", 0, 6 << 30, 128 << 20)
        state = k.file(f"{MEMORY}/memory48/state")
        os.chmod(state, 0o444)
        assert {e.name: e.stat().st_mode for e in os.scandir(state.parent)}[
            "state"
        ] & 0o777 == 0o444
        # Whoever asks: what nobody may write opens for nobody.
        assert refusal(k.write, f"{MEMORY}/memory48/state", "online") == errno.EACCES
        assert k.read(f"{MEMORY}/memory48/state") == "offline\n"
        os.chmod(state, 0o200)
        assert refusal(k.read, f"{MEMORY}/memory48/state") == errno.EACCES
        k.write(f"{MEMORY}/memory48/state", "online")
        k.unplug("passing")
        k.plug("passing", 0, 6 << 30, 128 << 20)
        assert stat.S_IMODE(state.stat().st_mode) == 0o644
        k.unplug("passing")
        k.validate()


def test_pages_flags_are_read_by_number(shared: Mounted) -> None:
    pfn = (1 << 32) // 4096
    with open(shared.file("/proc/kpageflags"), "rb", buffering=0) as f:
        assert os.pread(f.fileno(), 16, 8 * pfn) == (1 << 20).to_bytes(8, sys.byteorder) * 2
        assert refusal(os.pread, f.fileno(), 12, 0) == errno.EINVAL
        online = np.frombuffer(os.pread(f.fileno(), 1 << 20, 0), dtype=np.uint64)
    assert len(online) == 1 << 17
    assert {0x400, 1 << 32} <= set(online.tolist())  # free in the buddy, reserved


def test_every_text_is_the_machines(shared: Mounted) -> None:
    m = two_nodes()
    m.plug("d", 1, 1 << 32, 512 << 20)
    for path in ("/proc/iomem", "/proc/zoneinfo", f"{NODE}/node0/meminfo", f"{MEMORY}/probe"):
        if path.endswith("probe"):
            assert refusal(shared.read, path) == errno.EACCES
        else:
            assert shared.read(path) == m.read(path)


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_files_of_every_block_are_the_trees_and_never_kept(nodes: int) -> None:
    m = two_nodes() if nodes == 2 else Machine()
    if nodes == 2:
        m.plug("d", 1, 1 << 32, 512 << 20)
        m.write(f"{MEMORY}/memory33/state", "online_movable")
    with mounted(m) as k:
        for _ in range(2):
            listed = os.listdir(k.file(MEMORY))
            assert sorted(listed) == m.listdir(MEMORY)
            blocks = [name for name in listed if name.startswith("memory")]
            for path in (f"{MEMORY}/{b}/{n}" for b in blocks for n in m.listdir(f"{MEMORY}/{b}")):
                what, told = tree_stat(m, path), os.lstat(k.file(path))
                assert (stat.S_IMODE(told.st_mode), told.st_size) == (what.mode, what.size), path
                if what.kind == "file":
                    assert k.read(path) == m.read(path), path
        for name in ("memory00", "memory032", "memory9999", "memory", "memory0x", "memory-1"):
            assert refusal(os.stat, k.file(f"{MEMORY}/{name}")) == errno.ENOENT
            assert refusal(os.stat, k.file(f"{MEMORY}/{name}/state")) == errno.ENOENT
        if nodes == 2:
            files = ["state", "online", "valid_zones"]
            held = [os.open(k.file(f"{MEMORY}/memory32/{name}"), os.O_RDONLY) for name in files]
            for word in ("online_movable", "offline", "online_kernel", "offline"):
                m.write(f"{MEMORY}/memory32/state", word)
                k.write(f"{MEMORY}/memory32/state", word)
                for name, fd in zip(files, held, strict=True):
                    text = m.read(f"{MEMORY}/memory32/{name}")
                    assert k.read(f"{MEMORY}/memory32/{name}") == text
                    assert os.pread(fd, 100, 0).decode() == text
            for fd in held:
                os.close(fd)
        k.validate()
    m.validate()


def test_a_block_file_of_a_saved_machine_is_shown_as_it_was_saved() -> None:
    m, path = Machine(), f"{MEMORY}/memory2/removable"
    m.saved_texts[path] = SavedText(path, "0\n", m.read(path))
    assert m.read(path) == "0\n"
    with mounted(m) as k:
        assert k.read(path) == "0\n"
        assert k.read(f"{MEMORY}/memory3/removable") == "1\n"


def test_writes_act_and_hand_the_errno_back(shared: Mounted) -> None:
    state = f"{MEMORY}/memory32/state"
    shared.write(state, "online_movable")
    assert shared.read(state) == "online\n"
    assert refusal(shared.write, state, "online") == errno.EINVAL
    shared.step(op="alloc", id="x", count=10, gfp="GFP_HIGHUSER_MOVABLE", node=1)
    shared.write(f"{MEMORY}/memory33/state", "online_kernel")
    shared.step(op="alloc", id="y", count=100, node=1)
    assert refusal(shared.write, f"{MEMORY}/memory33/state", "offline") == errno.EBUSY
    assert refusal(shared.write, f"{MEMORY}/probe", "0x100000000") == errno.EEXIST
    assert refusal(shared.write, "/proc/meminfo", "1") == errno.EIO
    assert refusal(shared.write, f"{MEMORY}/block_size_bytes", "1") == errno.EACCES
    assert refusal(os.mkdir, shared.file(f"{MEMORY}/new")) == errno.EPERM
    assert refusal(shared.file(f"{MEMORY}/new").write_text, "x") == errno.EACCES
    assert refusal(os.unlink, shared.file(state)) == errno.EPERM
    shared.step(op="free", id="x")
    shared.step(op="free", id="y")
    shared.write(f"{MEMORY}/memory32/state", "offline")
    shared.write(f"{MEMORY}/memory33/state", "offline")


def test_a_shell_script_onlines_and_reacts_to_errors(shared: Mounted) -> None:
    script = f"""
        cd {shared.path}{MEMORY}
        for b in memory3[2-5]; do echo online_movable > $b/state || exit 1; done
        cat memory3[2-5]/state
        echo nonsense > memory32/state || echo "rc $?"
        for b in memory3[2-5]; do echo 0 > $b/online; done
        cat memory3[2-5]/state
    """
    out = sh(script)
    assert out.stdout.split() == ["online"] * 4 + ["rc", "1"] + ["offline"] * 4
    assert "write error: Invalid argument" in out.stderr


def test_listings_that_the_host_keeps_are_never_old() -> None:
    m = two_nodes()
    directories = [MEMORY, NODE, f"{NODE}/node1", "/sys/bus/memory/devices", "/sys/firmware/memmap"]
    with mounted(m) as k:

        def check() -> None:
            for path in directories:
                if path == f"{NODE}/node1" and 1 not in m.node_devices:
                    assert refusal(os.listdir, k.file(path)) == errno.ENOENT
                else:
                    assert sorted(os.listdir(k.file(path))) == sorted(m.listdir(path)), path

        for _ in range(2):
            check()
            check()
            k.plug("d", 1, 1 << 32, 512 << 20)
            assert m.plug("d", 1, 1 << 32, 512 << 20) == 0
            check()
            for word in ("online_movable", "offline"):
                k.write(f"{MEMORY}/memory32/state", word)
                m.write(f"{MEMORY}/memory32/state", word)
                check()
            k.unplug("d")
            assert m.unplug("d") == 0
            check()
        k.validate()
    m.validate()


def test_who_is_in_a_listing_sees_what_stays_once() -> None:
    """While names come and go before and behind the place that the listing has come to."""
    m = two_nodes(memory="4G", maxmem="1T", nodes=[{"cpus": "0-1", "memory": "4G"}, {}])
    m.plug("low", 1, 2 << 32, 128 << 20)
    m.plug("high", 1, 16 << 32, 128 << 30)
    m.plug("last", 1, 64 << 32, 128 << 20)
    stays = set(m.listdir(MEMORY)) - {"memory64", "memory2048"}
    with mounted(m) as k:
        with os.scandir(k.file(MEMORY)) as names, os.scandir(k.file(MEMORY)) as others:
            seen = [next(names).name for _ in range(50)]
            k.unplug("low")
            k.unplug("last")
            k.plug("new", 1, 3 << 32, 256 << 20)
            seen_by_others = [name.name for name in others]
            k.plug("low", 1, 2 << 32, 128 << 20)
            seen += [name.name for name in names]
        assert len(stays) > 1000
        for listed in (seen, seen_by_others):
            assert len(listed) == len(set(listed))
            assert stays <= set(listed)
        assert set(os.listdir(k.file(MEMORY))) == stays | {"memory64", "memory96", "memory97"}
        k.validate()


def _getdents(fd: int, size: int) -> list[str]:
    """Names of a directory from where its open file stands, as many as fit into so many bytes."""
    buffer = ctypes.create_string_buffer(size)
    got = ctypes.CDLL(None, use_errno=True).getdents64(fd, buffer, size)
    assert got >= 0, os.strerror(ctypes.get_errno())
    names, at = [], 0
    while at < got:
        length = int.from_bytes(buffer.raw[at + 16 : at + 18], "little")
        names.append(buffer.raw[at + 19 : at + length].split(b"\0")[0].decode())
        at += length
    return names


def _up_to(fd: int, last: str) -> list[str]:
    names = _getdents(fd, 40)
    while names[-1] != last:
        more = _getdents(fd, 40)
        assert more, f"no {last} among {names}"
        names += more
    return names


def _rest(fd: int) -> list[str]:
    names = []
    while more := _getdents(fd, 40):
        names += more
    os.close(fd)
    return names


def test_who_lists_with_a_small_buffer_sees_what_stays_once(shared: Mounted) -> None:
    """Of a directory that the host gets in one answer, and hands on in several."""
    shared.plug("low", 1, 48 << 27, 128 << 20)
    fd = os.open(shared.file(MEMORY), os.O_RDONLY)
    names = _up_to(fd, "memory48")
    shared.unplug("low")
    shared.plug("high", 1, 96 << 27, 256 << 20)
    stays = set(os.listdir(shared.file(MEMORY)))
    names += _rest(fd)
    assert stays <= set(names)
    assert len(names) == len(set(names))

    fd = os.open(shared.file(MEMORY), os.O_RDONLY)
    names = _up_to(fd, "memory96")
    shared.plug("low", 1, 48 << 27, 128 << 20)
    names += _rest(fd)
    assert stays <= set(names)
    assert len(names) == len(set(names))
    for dimm in ("low", "high"):
        shared.unplug(dimm)


def test_who_is_in_a_listing_that_nearly_all_of_goes_from_sees_what_stays() -> None:
    m = two_nodes(memory="4G", maxmem="1T", nodes=[{"cpus": "0-1", "memory": "4G"}, {}])
    with mounted(m) as k:
        k.plug("most", 1, 16 << 32, 128 << 30)
        k.plug("rest", 1, 2048 << 27, 64 << 30)
        with os.scandir(k.file(MEMORY)) as names:
            seen = [next(names).name]
            while seen[-1] != "memory2060":
                seen.append(next(names).name)
            k.unplug("most")
            stays = set(os.listdir(k.file(MEMORY)))
            seen += [name.name for name in names]
        assert {f"memory{number}" for number in range(2048, 2560)} <= stays
        assert stays <= set(seen) | {".", ".."}
        assert len(seen) == len(set(seen))
        k.validate()


def test_links_of_a_driver_go_with_what_is_unbound() -> None:
    drivers = "/sys/bus/dax/drivers"
    nodes = [{"cpus": "0-1", "memory": "2G"}, {"soft_reserved": "1G"}]
    with mounted({"memory": "2G", "maxmem": "8G", "cpus": 2, "nodes": nodes}) as k:
        links = [f"{drivers}/device_dax/dax0.0", "/sys/bus/dax/devices/dax0.0/driver"]
        assert all(os.path.lexists(k.file(path)) for path in links)
        k.write(f"{drivers}/device_dax/unbind", "dax0.0")
        assert not any(os.path.lexists(k.file(path)) for path in links)
        k.write(f"{drivers}/device_dax/bind", "dax0.0")
        assert all(os.path.lexists(k.file(path)) for path in links)
        k.validate()


def test_directories_come_and_go_with_blocks_and_nodes(shared: Mounted) -> None:
    block, node = shared.file(f"{MEMORY}/memory48"), shared.file(f"{NODE}/node1/memory48")
    for _ in range(3):
        assert not block.exists()
        shared.plug("e", 1, 48 << 27, 128 << 20)
        assert (block / "state").read_text() == "offline\n"
        assert (block / "power/control").exists()
        assert node.is_symlink()
        held = os.open(block / "state", os.O_RDONLY)
        shared.unplug("e")
        for path in (block, block / "state", block / "power/control", node):
            assert not os.path.lexists(path), path
        assert "memory48" not in os.listdir(block.parent)
        assert refusal(os.read, held, 10) == errno.ENODEV
        os.close(held)


def test_a_read_is_of_one_moment_however_it_is_cut(shared: Mounted) -> None:
    fd = os.open(shared.file("/proc/zoneinfo"), os.O_RDONLY)
    first = os.read(fd, 100)
    shared.write(f"{MEMORY}/memory32/state", "online_movable")
    rest = b""
    while part := os.read(fd, 100):
        rest += part
    again = os.pread(fd, 1 << 20, 0)
    shared.write(f"{MEMORY}/memory32/state", "offline")
    assert first + rest != again
    assert first + rest == shared.read("/proc/zoneinfo").encode()
    os.close(fd)


def test_uevents_stream_to_several_readers_and_the_mount_answers_meanwhile(
    shared: Mounted,
) -> None:
    pipe = shared.path / ".kmm" / "uevents_pipe"
    cats = [subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE) for _ in range(4)]
    shared.plug("f", 1, 64 << 27, 128 << 20)
    for cat in cats:
        assert cat.stdout is not None
        while b"memory64" not in cat.stdout.readline():
            pass
    shared.unplug("f")
    for cat in cats:
        assert cat.stdout is not None
        while cat.stdout.readline() != b"remove /devices/system/memory/memory64 memory\n":
            pass
        cat.send_signal(signal.SIGINT)
        assert cat.wait(10) == -signal.SIGINT
        cat.stdout.close()
    shared.status()


def test_two_hundred_readers_wait_for_a_pipe(shared: Mounted) -> None:
    pipe = shared.path / ".kmm" / "uevents_pipe"
    log = subprocess.Popen(["cat", shared.path / ".kmm" / "kmsg_pipe"], stdout=subprocess.DEVNULL)
    cats = [subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE) for _ in range(200)]
    try:
        _wait_for(lambda: all(_waits_for_a_reply(cat.pid) for cat in [*cats, log]))
        for cat in cats[::2]:
            cat.kill()
        for cat in cats[::2]:
            assert cat.wait(10) == -signal.SIGKILL
        shared.plug("g", 1, 64 << 27, 128 << 20)
        shared.unplug("g")
        for cat in cats[1::2]:
            assert cat.stdout is not None
            while cat.stdout.readline() != b"remove /devices/system/memory/memory64 memory\n":
                assert cat.poll() is None
        assert len(os.listdir(f"/proc/{shared.pid}/task")) == 1
    finally:
        for cat in [*cats, log]:
            cat.terminate()
            assert cat.wait(10)
            if cat.stdout is not None:
                cat.stdout.close()


def test_a_reader_of_a_pipe_who_will_not_wait(shared: Mounted) -> None:
    fd = os.open(shared.path / ".kmm" / "uevents_pipe", os.O_RDONLY)
    while len(os.read(fd, 1 << 16)) == 1 << 16:
        pass
    os.set_blocking(fd, False)
    assert refusal(os.read, fd, 10) == errno.EAGAIN
    os.close(fd)


def test_a_server_that_was_stopped_is_ended_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mount_module, "_PATIENCE", 0.2)
    with mounted(MACHINE, tmp_path) as k:
        os.kill(k.pid, signal.SIGSTOP)
    assert not Path(f"/proc/{k.pid}").exists()
    assert str(tmp_path) not in mounts()


def test_an_unmounted_machine_lets_go_of_who_waits(tmp_path: Path) -> None:
    pid = start(str(tmp_path), player_of(MACHINE))
    command = ["cat", tmp_path / ".kmm" / "kmsg_pipe"]
    cats = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=-1) for _ in range(2)]
    _wait_for(lambda: all(_waits_for_a_reply(cat.pid) for cat in cats))
    began = time.monotonic()
    unmount_and_wait(str(tmp_path), pid)
    for cat in cats:
        assert b"Transport endpoint" in cat.communicate(timeout=10)[1]
    assert time.monotonic() - began < 5
    assert str(tmp_path) not in mounts()


def test_a_second_mount_on_the_same_place_is_refused(shared: Mounted) -> None:
    with pytest.raises(MountError, match="a machine is mounted there already"):
        start(str(shared.path), player_of())
    out = kmm("mount", str(shared.path))
    assert out.returncode == 1
    assert out.stderr.count("\n") == 1
    assert "mounted there already" in out.stderr


def kmm(*args: str, **more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kmm", *args]
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        command, capture_output=True, text=True, timeout=60, check=False, **more
    )


def test_no_such_directory_no_directory_no_fuse_no_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path, why in (
        (tmp_path / "none", "No such file or directory"),
        (file, "not a directory"),
        (tmp_path, "not empty"),
    ):
        out = kmm("mount", str(path), "--background")
        assert out.returncode == 1, path
        assert out.stderr.count("\n") == 1
        assert why in out.stderr
    monkeypatch.setattr(mount_module, "FUSE_DEVICE", str(tmp_path / "fuse"))
    with pytest.raises(MountError, match="this host has no FUSE"):
        check()
    if os.geteuid() == 0:
        drop = f"""
import os, kmm.mount
kmm.mount.FUSE_DEVICE = {str(file)!r}
os.chmod(kmm.mount.FUSE_DEVICE, 0)
os.setuid(65534)
try:
    kmm.mount.check_fuse()
except kmm.mount.MountError as e:
    print(e)
"""
        tmp_path.chmod(0o755)
        for above in list(tmp_path.parents)[:3]:
            above.chmod(0o755)
        out = subprocess.run(
            [sys.executable, "-c", drop], capture_output=True, text=True, check=False
        )
        assert "Permission denied; its group, or root, may use it" in out.stdout, out.stderr


def test_mistakes_in_what_is_mounted_are_usage_errors(tmp_path: Path) -> None:
    for args in (
        ["--scenario", "none.toml"],
        ["--from", str(tmp_path)],
        ["--steps", "3"],
        ["--scenario", str(EXAMPLE), "--from", "/"],
        ["--scenario", str(EXAMPLE), "--steps", "999"],
    ):
        out = kmm("mount", str(tmp_path), *args)
        assert out.returncode == 2, out
        assert "Traceback" not in out.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, None])
def test_ctrl_c_and_unmounting_leave_nothing_behind(
    tmp_path: Path, number: signal.Signals | None
) -> None:
    server = subprocess.Popen(
        [sys.executable, "-m", "kmm", "mount", str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    assert server.stdout.readline() == f"{tmp_path}: mounted; umount or Ctrl-C ends it\n"
    cat = subprocess.Popen(
        ["cat", tmp_path / ".kmm" / "kmsg_pipe"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    if number is None:
        cat.kill()
        cat.wait(10)
        mount_module.unmount(str(tmp_path))
    else:
        assert cat.stdout is not None
        cat.stdout.readline()
        server.send_signal(number)
    assert server.wait(20) == 0
    cat.communicate(timeout=10)
    server.stdout.close()
    assert str(tmp_path) not in mounts()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("background", [False, True])
def test_that_it_is_mounted_can_be_had_as_json(tmp_path: Path, background: bool) -> None:
    command = [sys.executable, "-m", "kmm", "mount", str(tmp_path), "--json"]
    command += ["--scenario", str(EXAMPLE), "--steps", "2", *["--background"] * background]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        said = json.loads(started.stdout.readline())
        assert background or said["pid"] == started.pid
        steps = len(load_scenario(EXAMPLE).steps)
        control = f"{tmp_path}/.kmm"
        assert said == {
            "path": str(tmp_path),
            "pid": said["pid"],
            "control": control,
            "played": 2,
            "steps": steps,
        }
        assert json.loads(Path(control, "status").read_text())["pid"] == said["pid"]
        mount_module.unmount(str(tmp_path))
        assert started.stdout.read() == ""
    assert started.returncode == 0


def test_background_returns_when_the_mount_answers(tmp_path: Path) -> None:
    out = kmm("mount", "--scenario", str(EXAMPLE), "--steps", "2", "--background", str(tmp_path))
    assert out.returncode == 0, out.stderr
    k = Mounted(tmp_path, int(out.stdout))
    try:
        assert k.status()["pid"] == k.pid
        assert k.status()["played"] == 2
        k.control("next", "1")
        assert k.status()["played"] == 3
    finally:
        os.kill(k.pid, signal.SIGTERM)
    for _ in range(200):
        if str(tmp_path) not in mounts():
            break
        time.sleep(0.05)
    assert str(tmp_path) not in mounts()


def test_from_copies_of_files(tmp_path: Path) -> None:
    at, copy = tmp_path / "at", tmp_path / "copy"
    at.mkdir()
    copy.mkdir()
    names = ("iomem", "buddyinfo", "meminfo", "zoneinfo")
    with mounted(two_nodes()) as k:
        # What is only written cannot be copied.
        sh(f"cp -r {k.path}/proc {k.path}/sys {copy}")
        texts = {name: k.read(f"/proc/{name}") for name in names}
    out = kmm("mount", "--from", str(copy), "--background", str(at))
    assert out.returncode == 0, out.stderr
    k = Mounted(at, int(out.stdout))
    try:
        assert {name: k.read(f"/proc/{name}") for name in names} == texts
        k.validate()
    finally:
        mount_module.unmount(str(k.path))


def test_a_recording_can_be_mounted() -> None:
    player, played = chosen_player(None, str(RECORDINGS / "veto.json"), 1)
    assert played == 0
    with mounted(player) as k:
        assert k.read("/proc/buddyinfo") == player.m.read("/proc/buddyinfo")


@pytest.mark.parametrize("remembered", [False, True], ids=["forgotten", "remembered"])
def test_a_killed_server_leaves_errors_and_a_hint(
    tmp_path: Path, remembered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = start(str(tmp_path), player_of(Machine()))
    there = os.stat(tmp_path)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if remembered:  # as the host may, for as long as the server has allowed
        monkeypatch.setattr(mount_module.os, "stat", lambda path: there)
    try:
        assert refusal(os.listdir, tmp_path) == errno.ENOTCONN
        with pytest.raises(MountError, match="a mount whose server has died"):
            start(str(tmp_path), player_of())
    finally:
        unmount_and_wait(str(tmp_path), pid)
    assert os.listdir(tmp_path) == []


def test_a_server_ends_with_the_tests_that_started_it(tmp_path: Path) -> None:
    script = f"""
import os
from kmm.machine_source import player_of
from kmm.mount import start
print(start({str(tmp_path)!r}, player_of()), flush=True)
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE)
    for _ in range(200):
        if str(tmp_path) not in mounts():
            break
        time.sleep(0.05)
    assert str(tmp_path) not in mounts()


def test_eight_processes_read_and_write_at_random() -> None:
    """``python -m tests.hammer --seconds 3600`` does the same for an hour."""
    said = hammer(seconds=5, processes=8, seed=1)
    assert said.operations > 500
    assert said.refused > 0
