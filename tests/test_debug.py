"""Dumps of pages in the log."""

from __future__ import annotations

import pytest

from kmm import Machine
from kmm.memory import User
from kmm.mempolicy import new_policy
from kmm.params import PG_PINNED
from tests.conftest import DIMM, two_nodes

NODE_1 = 1 << 54 | 3 << 51 | 0x1FFFFF << 30
AT_1 = "node=1|zone=3|lastcpupid=0x1fffff"


def machine() -> Machine:
    m = two_nodes("memhp_default_state=online_movable")
    m.plug("a", 1, DIMM, 256 << 20)
    return m


def grown(m: Machine, kind: str, pages: int, thp: str = "never", mapped: bool = False) -> User:
    user = User(m, "f", kind, pages, policy=new_policy(m, "bind", [1]), thp=thp)
    user.engine.mapped = mapped
    user.grow(pages)
    return user


def dumped(m: Machine, pfn: int, reason: str = "unmovable page") -> list[str]:
    m.log.clear()
    m.dump_page(pfn, reason)
    m.validate()
    return m.log


def test_an_anonymous_page() -> None:
    m = machine()
    pfn = int(grown(m, "anon", 10).pfns()[7])
    assert dumped(m, pfn) == [
        "page:(____ptrval____) refcount:1 mapcount:1 mapping:0000000000000000 "
        f"index:0x7 pfn:{pfn:#x}",
        f"anon flags: {NODE_1 | 0xA0014:#x}(uptodate|lru|mappedtodisk|swapbacked|{AT_1})",
        "page dumped because: unmovable page",
    ]


def test_a_page_that_is_held_while_it_should_move() -> None:
    m = machine()
    pfn = int(grown(m, "anon", 10).pfns()[7])
    flags = int(m.memmap["flags"][pfn])
    m.memmap_engine.set_page_flags(pfn, flags | PG_PINNED)
    first, second, _ = dumped(m, pfn, "migration failure")
    assert "refcount:3 mapcount:1" in first
    assert "(referenced|uptodate|dirty|mappedtodisk|swapbacked|node=1" in second, (
        "it is off its list"
    )


def test_any_page_of_a_huge_one() -> None:
    m = machine()
    pfn = int(grown(m, "anon", 512, "always").pfns()[300])
    page, head, flags, _ = dumped(m, pfn)
    assert f"index:0x12c pfn:{pfn:#x}" in page
    assert head == "head:(____ptrval____) order:9 compound_mapcount:1 compound_pincount:0"
    assert flags.startswith("anon flags: 0x")
    assert "(uptodate|lru|head|mappedtodisk|swapbacked|" in flags


@pytest.mark.parametrize(
    "kind, mapped, counts, aops, names",
    [
        ("shmem", False, (1, 0), "shmem_aops", "referenced|uptodate|dirty|lru|swapbacked"),
        ("file", False, (1, 0), "ext4_da_aops", "uptodate|lru|mappedtodisk"),
        ("file", True, (2, 1), "ext4_da_aops", "uptodate|lru|mappedtodisk"),
    ],
)
def test_a_file_and_where_it_lies(
    kind: str, mapped: bool, counts: tuple[int, int], aops: str, names: str
) -> None:
    m = machine()
    user = grown(m, kind, 10, mapped=mapped)
    page, mapping, flags, _ = dumped(m, int(user.pfns()[9]))
    assert f"refcount:{counts[0]} mapcount:{counts[1]} mapping:(____ptrval____) index:0x9" in page
    assert mapping == f'aops:{aops} ino:{user.engine.number:x} dentry name:"f"'
    assert f"({names}|{AT_1})" in flags


def test_a_slab_of_several_pages() -> None:
    m = machine()
    user = User(m, "inodes", "slab_reclaimable", 2, order=3)
    user.grow(2)
    pfn = int(user.pfns()[1])
    page, head, flags, _ = dumped(m, pfn + 5)
    assert f"mapcount:0 mapping:0000000000000000 index:0x0 pfn:{pfn + 5:#x}" in page
    assert head == "head:(____ptrval____) order:3 compound_mapcount:0 compound_pincount:0"
    assert "(slab|head|node=0|" in flags


def test_the_type_of_a_page_shows_as_its_mapcount() -> None:
    m = machine()
    for kind, count in (("offline", -256), ("page_table", -512)):
        user = User(m, kind, kind, 1)
        user.grow(1)
        assert f"refcount:1 mapcount:{count} " in dumped(m, int(user.pfns()[0]))[0]


def test_what_nobody_is_known_to_use_is_slab() -> None:
    m = machine()
    assert "(slab|node=0|" in dumped(m, m.alloc_pages())[1]
