"""``kmm shell``: what the command sees, that it sees nothing else, and its exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from kmm import namespace
from kmm.mount import MountError, mounted
from kmm.namespace import MORE, NEEDED
from tests.fuse import MACHINE, needs_fuse, sh, why_no_namespace

EXAMPLE = Path(__file__).parent.parent / "examples" / "first_dimm.toml"
MEMORY = "/sys/devices/system/memory"
# Before that, an interrupted Python tells where in itself it was.
STARTED = "import site; site.main(); import kmm_command; kmm_command.main()"


pytestmark = [
    needs_fuse,
    pytest.mark.skipif(bool(why_no_namespace()), reason=why_no_namespace() or "they are there"),
]
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


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


@pytest.mark.parametrize(
    ("name", "status", "why"),
    [
        ("nosuchcmd", 127, "No such file or directory"),
        ("/no/such", 127, "No such file or directory"),
        ("/etc/passwd", 126, "Permission denied"),
        ("/etc", 126, "Permission denied"),
    ],
)
def test_a_command_that_cannot_be_started_is_one_line(name: str, status: int, why: str) -> None:
    command = [sys.executable, "-m", "kmm", "shell", "--", name]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert out.returncode == status
    assert out.stderr == f"Error: {name}: {why}; it was not started\n"
    assert out.returncode == subprocess.run(["sh", "-c", name], check=False).returncode


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


# -- without root ---------------------------------------------------------------------------------

NOBODY = 65534


def reachable_by_others(paths: Iterable[str]) -> str:
    """Return shell lines that make directories reachable, in a mount namespace of its own.

    What is above them and closed to others, as /root is, is covered by an open directory.
    """
    closed: dict[str, list[str]] = {}
    for path in map(os.path.realpath, paths):
        above = [str(p) for p in reversed(Path(path).parents) if not p.stat().st_mode & 1]
        if above:
            closed.setdefault(above[0], []).append(path)
    lines = []
    for top, inside in closed.items():
        keep = [
            f"mkdir $KEEP/{i} && mount --rbind {path} $KEEP/{i}" for i, path in enumerate(inside)
        ]
        back = [
            f"mkdir -p {path} && mount --rbind $KEEP/{i} {path}" for i, path in enumerate(inside)
        ]
        hide = "mount -t tmpfs -o mode=711 none"
        lines += ["KEEP=$(mktemp -d)", f"{hide} $KEEP", *keep, f"{hide} {top}", *back]
    return "\n".join(["set -e; umask 022", *lines, "set +e"])


class Nobody:
    """An ordinary user who runs kmm.

    :param home: a directory of theirs.
    """

    def __init__(self, home: str) -> None:
        source = str(Path(namespace.__file__).parents[1])
        python_path = ":".join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.become = f"setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups"
        self.env = f"env HOME={home} TMPDIR={home} PYTHONPATH={python_path}"
        where = [source, sys.prefix, sys.base_prefix]
        self.reachable = reachable_by_others(where)
        self.home = home

    def run(self, command: str, before: str = "") -> subprocess.CompletedProcess[str]:
        """Run a shell command as that user.

        :param before: what root does first, in a mount namespace of its own.
        """
        script = f"{self.reachable}\ncd /\n{before}\n{self.become} {self.env} {command}"
        return subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "bash", "-c", script],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def shell(self, command: str, before: str = "") -> subprocess.CompletedProcess[str]:
        """Run ``kmm shell`` as that user."""
        return self.run(f"{sys.executable} -m kmm shell -- {command}", before)


@pytest.fixture
def nobody() -> Iterator[Nobody]:
    with tempfile.TemporaryDirectory(prefix="kmm-nobody-") as home:
        os.chown(home, NOBODY, NOBODY)
        out = Nobody(home)
        if (said := out.run(f"{sys.executable} -c 'import kmm.fusefs'")).returncode:
            pytest.skip(f"others cannot read where kmm is installed: {said.stderr[-200:]}")
        yield out


@only_root
def test_an_ordinary_user_may_where_the_host_allows_it(nobody: Nobody) -> None:
    if (said := nobody.run("unshare --user --map-root-user --mount true")).returncode:
        pytest.skip(f"no user namespaces for others here: {said.stderr.strip()}")
    if (said := nobody.run("test -r /dev/fuse -a -w /dev/fuse")).returncode:
        pytest.skip("others may not use /dev/fuse here")
    state = f"{MEMORY}/memory5/state"
    tries = f"umount {MEMORY} || mount --bind /tmp /mnt || nsenter -m -t 1 true"
    script = f"""
        echo offline > {state}; cat {state}
        cmp /proc/zoneinfo $KMM_DIR/proc/zoneinfo && echo same
        echo e 0 0x180000000 256M > $KMM_DIR/.kmm/plug && cat {MEMORY}/memory48/state
        ({tries}) 2>/dev/null && echo reached
        exit 7
    """
    out = nobody.shell(f"sh -c '{script}'")
    assert out.stdout == "offline\nsame\noffline\n", out
    assert (out.stderr, out.returncode) == ("", 7)
    assert os.listdir(nobody.home) == []


@only_root
def test_an_ordinary_user_without_user_namespaces_is_told_so(nobody: Nobody) -> None:
    # Whoever is in another root directory may make none.
    root = f"{nobody.home}/root"
    elsewhere = f"mkdir {root} && mount --rbind / {root} && cd {root} && chroot {root}"
    out = nobody.run(f"{sys.executable} -m kmm shell -- true", f"{elsewhere} \\")
    said = "Error: kmm shell: this host lets us make no mount namespace (unshare failed: "
    assert (out.returncode, out.stdout) == (1, ""), out
    assert out.stderr.startswith(said), out
    assert out.stderr.count("\n") == 1


@only_root
@pytest.mark.parametrize("command", ["shell -- true", "mount $HOME"])
def test_an_ordinary_user_who_may_not_use_fuse_is_told_so(nobody: Nobody, command: str) -> None:
    device = f"{nobody.home}/fuse"
    closed = f"mknod -m 600 {device} c 10 229 && mount --bind {device} /dev/fuse"
    out = nobody.run(f"sh -c '{sys.executable} -m kmm {command}'", closed)
    assert (out.returncode, out.stdout) == (1, "")
    assert out.stderr == "Error: /dev/fuse: Permission denied; its group, or root, may use it\n"


@only_root
def test_root_who_may_not_mount_uses_a_user_namespace_too() -> None:
    if sh("setpriv --bounding-set=-sys_admin unshare -Urm true").returncode:
        pytest.skip("no user namespaces for root without CAP_SYS_ADMIN here")
    inside = f"{sys.executable} -m kmm shell -- cat {MEMORY}/memory3/state"
    out = sh(f"setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin {inside}")
    assert (out.stdout, out.stderr) == ("online\n", ""), out


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
    user = "" if os.geteuid() == 0 else "--user --map-root-user"
    out = sh(
        f"unshare {user} -m --propagation unchanged "
        f"sh -c 'mount --make-rshared / && {sys.executable} -c \"$CODE\" /tmp/started'",
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


@pytest.mark.parametrize("after", [0.2, 0.4, 0.6, 0.8, 1.0])
def test_ctrl_c_while_it_starts_is_no_traceback(after: float) -> None:
    command = [sys.executable, "-S", "-c", STARTED, "shell", "--", "sleep", "5"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, process_group=0) as run:
        time.sleep(after)
        os.killpg(run.pid, signal.SIGINT)
        _, said = run.communicate(timeout=20)
    assert run.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in said or "kmm" not in said
