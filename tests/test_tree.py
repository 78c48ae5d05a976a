"""The tree without FUSE: attributes, listings, reads and stores are sysfs's and proc's."""

from __future__ import annotations

import errno
import os
import stat

import numpy as np
import pytest

from kmm import KernelError, Machine
from kmm import sysfs as paths
from kmm.gfp import GFP_KERNEL
from kmm.snapshot import differences, dump
from kmm.tree import LINES_KEPT, Lines, Tree
from tests.conftest import DIMM, two_nodes
from tests.test_sysfs import walk

MEMORY, NODE = "/sys/devices/system/memory", "/sys/devices/system/node"
BLOCK = 128 << 20
KINDS = {"file": stat.S_IFREG, "directory": stat.S_IFDIR, "link": stat.S_IFLNK}


@pytest.fixture
def tree() -> Tree:
    m = two_nodes()
    m.plug("a", 1, DIMM, 2 * BLOCK)
    return Tree(m)


def refusal(call: object, *args: object) -> int:
    with pytest.raises(KernelError) as e:
        call(*args)  # type: ignore[operator]
    return e.value.errno or 0


def store(tree: Tree, path: str, data: bytes, offset: int = 0) -> int:
    return tree.open(path, os.O_WRONLY).write(data, offset)


def test_every_path_has_the_attributes_that_stat_tells_and_the_kind_that_its_listing_tells(
    tree: Tree,
) -> None:
    for path in walk(tree.m, "/"):
        what, attr = paths.stat(tree.m, path), tree.attr(path)
        assert attr.mode == KINDS[what.kind] | what.mode, path
        assert attr.size == what.size
        above, _, name = path.rpartition("/")
        told = dict(tree.listdir(above or "/"))[name]
        assert told == (KINDS["file"] if what.kind == "file" else attr.mode), path
    assert tree.attr(f"{MEMORY}/memory32/state").size == 4096
    assert tree.attr("/proc/zoneinfo").size == 0
    assert tree.readlink(f"{MEMORY}/memory32/node1") == "../../node/node1"
    assert refusal(tree.readlink, MEMORY) == errno.EINVAL
    assert refusal(tree.listdir, f"{MEMORY}/memory32/state") == errno.ENOTDIR


def test_attributes_and_listings_make_no_text(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> str:
        raise AssertionError("a text was made")

    monkeypatch.setattr("kmm.procfs.node_meminfo", never)
    assert tree.attr(f"{NODE}/node1/meminfo").mode == stat.S_IFREG | 0o444
    assert ("meminfo", stat.S_IFREG) in tree.listdir(f"{NODE}/node1")
    file = tree.open(f"{NODE}/node1/meminfo", os.O_RDONLY)
    with pytest.raises(AssertionError):
        file.read(4096, 0)


def test_what_is_gone_with_its_device_is_gone_wholly(tree: Tree) -> None:
    before = walk(tree.m, "/")
    tree.m.unplug("a")
    gone = [path for path in before if paths.lookup(tree.m, path) is None]
    assert f"{MEMORY}/memory32/power/control" in gone
    assert f"{NODE}/node1/meminfo" in gone
    for path in before:
        if path in gone:
            assert refusal(tree.attr, path) == errno.ENOENT, path
        else:
            tree.attr(path)
    told = set(tree.vanished())
    tops = [p for p in gone if os.path.dirname(p) not in gone]
    assert {p for p in tops if not p.startswith("/sys/devices/system/node/node0")} <= told
    assert not set(tree.vanished())


def test_a_text_is_as_of_its_first_read_and_new_when_read_again(tree: Tree) -> None:
    path = f"{MEMORY}/memory32/state"
    file = tree.open(path, os.O_RDONLY)
    assert file.read(3, 0) == b"off"
    store(tree, path, b"online_movable\n")
    assert file.read(100, 3) == b"line\n"
    assert file.read(100, 8) == b""
    assert file.read(100, 0) == b"online\n"
    tree.m.validate()


def test_kpageflags_are_words_of_pages(tree: Tree) -> None:
    m = tree.m
    file = tree.open("/proc/kpageflags", os.O_RDONLY)
    pfn = m.alloc_pages(0, GFP_KERNEL, 0)
    words = np.frombuffer(file.read(8 * 512, 8 * (pfn // 512 * 512)), dtype=np.uint64)
    assert (words == m.kpageflags(pfn // 512 * 512, 512)).all()
    m.free_pages(pfn, 0)
    end = -(-m.max_pfn // 32768) * 32768
    assert len(file.read(1 << 17, 8 * (end - 4))) == 32
    assert file.read(4096, 8 * end) == b""
    for size, offset in ((12, 0), (4096, 4)):
        with pytest.raises(KernelError) as refused:
            file.read(size, offset)
        assert refused.value.errno == errno.EINVAL
    with pytest.raises(KernelError) as refused:
        m.read("/proc/kpageflags")
    assert refused.value.errno == errno.EINVAL
    m.validate()


def test_an_open_file_of_a_device_that_is_gone(tree: Tree) -> None:
    file = tree.open(f"{MEMORY}/memory32/state", os.O_RDWR)
    tree.m.unplug("a")
    with tree.lock:
        tree.happened()
    assert refusal(file.read, 100, 0) == errno.ENODEV
    assert refusal(file.write, b"online", 0) == errno.ENODEV


@pytest.mark.parametrize("text", [b"online_movable", b"online_movable\n", b"online_movable\0junk"])
def test_a_store_takes_what_a_kernel_string_holds(tree: Tree, text: bytes) -> None:
    assert store(tree, f"{MEMORY}/memory32/state", text) == len(text)
    assert tree.m.read(f"{MEMORY}/memory32/state") == "online\n"
    tree.m.validate()


@pytest.mark.parametrize(
    "junk", [b"Online", b" online", b"online \n", b"", b"\0", b"online\n\n", b"x" * (1 << 20)]
)
def test_a_store_refuses_the_rest_and_changes_nothing(tree: Tree, junk: bytes) -> None:
    before = dump(tree.m)
    assert refusal(store, tree, f"{MEMORY}/memory32/state", junk) == errno.EINVAL
    assert not differences(before, dump(tree.m))
    tree.m.validate()


def test_sysfs_takes_a_page_at_a_time_wherever_it_is_written(tree: Tree) -> None:
    path = f"{MEMORY}/auto_online_blocks"
    assert store(tree, path, b"online\0" + b"x" * 10000) == 4096
    assert tree.m.read(path) == "online\n"
    assert store(tree, path, b"offline", 4096) == 7
    assert tree.m.read(path) == "offline\n"


def test_a_sysctl_takes_all_and_ignores_what_is_not_at_its_start(tree: Tree) -> None:
    path = "/proc/sys/vm/min_free_kbytes"
    assert store(tree, path, b"4096\n" + b" " * 100000) == 100005
    assert store(tree, path, b"8192\n", 10) == 5
    assert tree.m.read(path) == "4096\n"
    assert refusal(store, tree, path, b"1" * (4 << 20)) == errno.ENOMEM
    tree.m.validate()


def test_what_opens_and_what_does_not(tree: Tree) -> None:
    assert refusal(tree.open, f"{MEMORY}/probe", os.O_RDONLY) == errno.EACCES
    assert refusal(tree.open, f"{MEMORY}/block_size_bytes", os.O_WRONLY) == errno.EACCES
    assert refusal(tree.open, f"{MEMORY}/block_size_bytes", os.O_RDWR) == errno.EACCES
    assert refusal(tree.open, "/proc/sys/vm/compact_memory", os.O_RDONLY) == errno.EACCES
    assert refusal(tree.open, MEMORY, os.O_RDONLY) == errno.EISDIR
    assert refusal(tree.open, f"{MEMORY}/memory99/state", os.O_RDONLY) == errno.ENOENT
    assert refusal(store, tree, "/proc/meminfo", b"1") == errno.EIO


def test_the_oldest_lines_go_and_the_others_keep_their_numbers() -> None:
    lines = Lines([str(i) for i in range(2 * LINES_KEPT + 1)])
    lines.trim()
    assert len(lines.lines) == LINES_KEPT
    assert lines.end == 2 * LINES_KEPT + 1
    assert lines.after(lines.end - 1) == [str(2 * LINES_KEPT)]
    assert lines.after(0)[0] == str(LINES_KEPT + 1)


def test_what_a_machine_says_does_not_grow_without_end() -> None:
    m = Machine()
    tree = Tree(m)
    end = tree.log.end
    m.log += ["line"] * (3 * LINES_KEPT)
    store(tree, f"{MEMORY}/uevent", b"add")
    assert len(m.log) == LINES_KEPT
    assert tree.log.end == end + 3 * LINES_KEPT
