"""``kmm shell``: what the command sees, that it sees nothing else, and its exit status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kmm import namespace
from kmm.mount import MountError, mounted
from kmm.namespace import MORE, NEEDED
from tests.fuse import MACHINE, needs_fuse, sh

EXAMPLE = Path(__file__).parent.parent / "examples" / "first_dimm.toml"
MEMORY = "/sys/devices/system/memory"


def can_unshare() -> bool:
    return sh("unshare -m --propagation private true").returncode == 0


pytestmark = [
    needs_fuse,
    pytest.mark.skipif(not can_unshare(), reason="no mount namespaces for us here"),
]


def shell(line: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kmm", "shell", *options, "--", "bash", "-c", line]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_machines_files_lie_over_the_hosts() -> None:
    script = f"""
        echo $KMM; ls $KMM_DIR/.kmm | head -1
        echo e 1 0x180000000 256M > $KMM_DIR/.kmm/plug
        cd {MEMORY} && echo online_movable > memory48/state && cat memory48/state
        grep -c MemTotal /proc/meminfo
        cat /sys/bus/memory/devices/memory48/state /proc/sys/vm/min_free_kbytes
        cmp /proc/zoneinfo $KMM_DIR/proc/zoneinfo && echo same
    """
    before = sorted(os.listdir(MEMORY)) if os.path.isdir(MEMORY) else []
    out = shell(script, "--scenario", str(EXAMPLE), "--steps", "0")
    assert out.stderr == ""
    assert out.stdout.split()[:5] == ["1", "fail", "online", "1", "online"]
    assert out.stdout.split()[-1] == "same"
    assert (sorted(os.listdir(MEMORY)) if os.path.isdir(MEMORY) else []) == before


@pytest.mark.parametrize(
    ("line", "status"),
    [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 143), ("kill -KILL $$", 137)],
)
def test_the_exit_status_is_the_commands(line: str, status: int) -> None:
    assert shell(line).returncode == status


def test_a_command_that_is_not_there_is_one_line() -> None:
    command = [sys.executable, "-m", "kmm", "shell", "--", "/no/such"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert out.returncode == 1
    assert out.stderr == "Error: /no/such: No such file or directory\n"


def test_nobody_inside_can_take_the_machines_files_away() -> None:
    tries = [
        f"umount {MEMORY}",
        f"umount -l {MEMORY}",
        "mount -t sysfs none /mnt",
        "mount --bind /tmp /mnt",
        f"unshare -m umount {MEMORY}",
        f"unshare -Urm umount {MEMORY}",
        "unshare -Urm mount -t sysfs none /mnt",
        "nsenter -m -t 1 true",
    ]
    state = f"{MEMORY}/memory3/state"
    script = "; ".join(f"{line} && echo reached" for line in tries)
    out = shell(f"{script}; cmp {state} $KMM_DIR{state} && echo still")
    assert out.stdout == "still\n", out


def test_no_link_of_the_machine_leads_to_the_host() -> None:
    with mounted(MACHINE) as k:
        k.plug("d", 1, 1 << 32, 256 << 20)
        roots = (*NEEDED, *MORE, "/proc")
        top = str(k.path)
        for root in (*NEEDED, *MORE):
            for where, directories, files in os.walk(top + root):
                for name in directories + files:
                    path = os.path.join(where, name)
                    if os.path.islink(path):
                        leads = os.path.realpath(path).removeprefix(top)
                        assert any(leads == r or leads.startswith(r + "/") for r in roots), path


def test_what_the_host_has_not_is_put_there() -> None:
    """A /sys without a directory for memory, as in many containers, is no obstacle."""
    inside = f"{sys.executable} -m kmm shell -- cat {MEMORY}/memory3/state /sys/devices/beside/x"
    script = f"""
        mount -t tmpfs none /sys && mkdir -p /sys/devices/beside
        echo here > /sys/devices/beside/x
        {inside}
    """
    root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    out = subprocess.run(
        ["unshare", *root, "--mount", "--propagation", "private", "bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert out.stdout == "online\nhere\n", out
    assert out.returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_without_root_where_the_host_allows_it() -> None:
    source = Path(namespace.__file__).parents[1]
    nobody = f"cd / && setpriv --reuid 65534 --regid 65534 --clear-groups env PYTHONPATH={source}"
    if sh(f"{nobody} unshare -Urm true").returncode:
        pytest.skip("no user namespaces here")
    if sh(f"{nobody} {sys.executable} -c 'import kmm.fusefs'").returncode:
        pytest.skip("others cannot read where kmm is installed")
    state = f"{MEMORY}/memory5/state"
    command = f"sh -c 'echo offline > {state}; cat {state}; umount {MEMORY} && echo reached'"
    out = sh(f"{nobody} {sys.executable} -m kmm shell -- {command}")
    assert out.stdout == "offline\n", out


def test_it_refuses_to_start_if_something_is_not_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MountError, match=f"{MEMORY}: would still be this host's"):
        namespace._check_covered("/proc", [])
    monkeypatch.setattr(namespace.os, "readlink", lambda path: "mnt:[1]")
    with pytest.raises(MountError, match="no mount namespace of its own; nothing was started"):
        namespace.shell(None, 0, ["true"], "mnt:[1]", "/nowhere")  # type: ignore[arg-type]


def test_it_refuses_to_start_where_mounts_reach_other_namespaces() -> None:
    code = """
import sys
from kmm.mount import MountError, player_of
from kmm.namespace import shell
try:
    shell(player_of(), 0, ["touch", sys.argv[1]], "another", "/mnt")
except MountError as e:
    print(e)
"""
    out = sh(
        f"unshare -m --propagation unchanged sh -c 'mount --make-rshared / && {sys.executable} "
        f'-c "$CODE" /tmp/started\'',
        env=os.environ | {"CODE": code},
    )
    assert "mounts there reach other namespaces; nothing was started" in out.stdout, out
    assert not os.path.exists("/tmp/started")


def test_it_says_so_if_the_server_died_meanwhile() -> None:
    out = shell(
        "kill -9 $(sed 's/.*\"pid\": \\([0-9]*\\).*/\\1/' $KMM_DIR/.kmm/status); sleep 0.5;"
        f" cat {MEMORY}/memory3/state"
    )
    assert out.returncode == 1
    assert "Transport endpoint is not connected\n" in out.stderr
    assert "the machine's server has ended while the command ran" in out.stderr


def test_it_leaves_no_process_nor_directory_behind() -> None:
    out = shell("echo $KMM_DIR; cat $KMM_DIR/.kmm/status")
    where, status = out.stdout.splitlines()
    assert not os.path.exists(where)
    pid = int(status.split('"pid": ')[1].split(",")[0])
    assert not os.path.exists(f"/proc/{pid}")
