"""A malformed write gets the kernel's errno and changes nothing, whatever the file."""

from __future__ import annotations

import os
import subprocess

import pytest

from kmm.mount import mounted
from kmm.sysfs import entries
from tests import malformed
from tests.programs import need_fuse
from tests.test_programs import four_dimms

#: How many for each file; ``python -m tests.malformed`` does ten thousand.
WRITES = int(os.environ.get("KMM_MALFORMED", "60"))
MEMORY = malformed.MEMORY


def test_every_file_refuses_what_is_malformed() -> None:
    m = four_dimms(soft_reserved="512M")
    tried = {path: malformed.check(m, path, proc, WRITES) for path, proc in malformed.writable(m)}
    assert len(tried) > 200
    for path, done in tried.items():
        assert done == (WRITES if malformed.rule(path) else 0), path
    m.validate()


def test_every_writable_file_has_a_rule() -> None:
    """A file that is new has to be thought about."""
    m = four_dimms(soft_reserved="512M")
    m.plug_container([("c", 1, m.dimms["dimm3"].addr + (1 << 30), 128 << 20)])
    paths = [p for p, e in entries(m) if e.write is not None and e.mode & 0o222]
    assert any("container" in p for p in paths)
    for path in paths:
        malformed.rule(path)


@pytest.mark.parametrize(
    ("path", "value", "code"),
    [
        (f"{MEMORY}/memory40/state", "online\0junk", 0),  # a store sees what is before the NUL
        (f"{MEMORY}/memory40/state", "\0online", 22),
        (f"{MEMORY}/memory40/state", "online\n", 22),  # one newline is forgiven, and echo's is it
        (f"{MEMORY}/memory40/uevent", "add x", 22),
        (f"{MEMORY}/memory40/uevent", " add", 22),
        (f"{MEMORY}/memory40/uevent", "add fe4d7c9d-b8c6-4a70-9ef1-3d8a58d18eed A=1 B=abc", 0),
        (f"{MEMORY}/memory40/uevent", "add fe4d7c9d-b8c6-4a70-9ef1-3d8a58d18eed A", 22),
        (f"{MEMORY}/soft_offline_page", "0x10000000000000000", 22),
        (f"{MEMORY}/probe", "0x10000000000000000", 34),
        ("/sys/firmware/acpi/hotplug/memory/enabled", "0x1", 22),
        ("/proc/sys/vm/swappiness", "7 junk", 0),  # one number is looked for
        ("/proc/sys/vm/swappiness", "7junk", 22),
    ],
)
def test_what_the_parsers_are_known_for(path: str, value: str, code: int) -> None:
    m = four_dimms()
    have = 0
    try:
        m.write(path, value)
    except OSError as e:
        have = e.errno or 0
    assert have == code
    m.validate()


def test_a_program_gets_the_same_errno_through_fuse() -> None:
    need_fuse()
    m = four_dimms(soft_reserved="512M")
    files = malformed.writable(m)
    rng = malformed.random.Random(3)
    tried = 0
    with mounted(m) as there:
        for path, proc in rng.sample(files, 60):
            found = malformed.rule(path)
            if found is None:
                continue
            values = malformed.values(found[2], rng)
            for value in (next(values) for _ in range(60)):
                want = found[1](malformed.seen(value, proc))
                if want is None or len(value) > malformed.PAGE - 2:
                    continue
                try:
                    there.write(path, value)
                    have = 0
                except OSError as e:
                    have = e.errno or 0
                assert have == want, (path, value)
                tried += 1
        there.validate()
        blocks = [there.read(f"{MEMORY}/memory{b}/state") for b in m.memory_blocks]
        junk = subprocess.run(
            ["sh", "-c", f"head -c 1048576 /dev/urandom > {there.file(MEMORY)}/memory40/state"],
            capture_output=True,
            text=True,
        )
        assert "Invalid argument" in junk.stderr
        assert there.read(f"{MEMORY}/memory40/state") == "offline\n"
    assert blocks == [f"{b.state}\n" for b in m.memory_blocks.values()]
    assert tried > 1000
