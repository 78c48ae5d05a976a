"""Others' Cython code, compiled against the package as it is installed, calls the allocator."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kmm import Machine
from tests.conftest import DIMM, two_nodes

SOURCES = Path(__file__).parent / "extending"
DOC = Path(__file__).parent.parent / "docs" / "extending.md"


MASKED = """
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from kmm._buddy cimport GFP_ATOMIC, PageAllocator, alloc_pages, alloc_pages_bulk


def bulk(PageAllocator machine, int order, int n, uint64_t nodes):
    cdef uint64_t* out = <uint64_t*>calloc(n, sizeof(uint64_t))
    got = alloc_pages_bulk(machine.mem, GFP_ATOMIC, order, 1, nodes, 0, out, n)
    pfns = [out[i] for i in range(got)]
    free(out)
    return pfns


def singles(PageAllocator machine, int order, int n, uint64_t nodes):
    got = [alloc_pages(machine.mem, GFP_ATOMIC, order, 1, nodes, 0) for _ in range(n)]
    return [pfn for pfn in got if pfn >= 0]
"""


def compile_jobs(where: Path, *directives: str) -> ModuleType:
    """Build the simulator in a directory of its own; any warning fails."""
    source = (SOURCES / "jobs.pyx").read_text()
    return compile_source(where, "".join(f"# cython: {d}\n" for d in directives) + source)


def compile_source(where: Path, source: str) -> ModuleType:
    shutil.copy(SOURCES / "setup.py", where)
    (where / "jobs.pyx").write_text(source)
    built = subprocess.run(
        [sys.executable, "-W", "ignore", "setup.py", "build_ext", "--inplace"],
        cwd=where,
        env={**os.environ, "CFLAGS": "-Wall -Werror -O1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert "warning" not in (built.stdout + built.stderr).lower()
    spec = importlib.util.spec_from_file_location("jobs", next(where.glob("jobs*.so")))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return compile_jobs(tmp_path_factory.mktemp("jobs"))


def machine() -> Machine:
    m = two_nodes("memhp_default_state=online_kernel")
    m.plug("a", 1, DIMM, 128 << 20)
    m.alloc_pages(nid=1)
    return m


def events(m: Machine) -> tuple[int, int]:
    zones = [z.vm_events for z in m.all_zones()]
    return sum(z["pgalloc"] for z in zones), sum(z["pgfree"] for z in zones)


def test_jobs_take_and_free_pages_and_all_add_up(jobs: ModuleType) -> None:
    m = machine()
    free = sum(z.nr_free_pages + z.pcp_pages() for z in m.all_zones())
    before = events(m)
    assert jobs.run(m, 1, 1000, 20) == 0
    after = events(m)
    assert after[0] - before[0] == after[1] - before[1] == 1000 * (512 + 8 + 16)
    assert sum(z.nr_free_pages + z.pcp_pages() for z in m.all_zones()) == free
    m.validate()


def test_jobs_are_turned_away_when_memory_is_short_and_leave_nothing(jobs: ModuleType) -> None:
    m = machine()
    free = sum(z.nr_free_pages + z.pcp_pages() for z in m.all_zones())
    assert jobs.run(m, 0, 2000, 1000) > 0
    assert sum(z.nr_free_pages + z.pcp_pages() for z in m.all_zones()) == free
    m.validate()


def test_a_run_from_c_is_the_same_calls_from_python(jobs: ModuleType) -> None:
    a, b = machine(), machine()
    jobs.run(a, 1, 1, 1)
    pages = b.alloc_pages_bulk(512, nid=1, cpu=0)
    stack, buffer = b.alloc_pages(3, nid=1, cpu=0), b.alloc_pages(4, nid=1, cpu=0)
    b.split_page(buffer, 4)
    for pfn in range(buffer, buffer + 8):
        b.free_pages(pfn, cpu=0)
    b.free_pages_bulk(pages, cpu=0)
    b.free_pages(stack, 3, cpu=0)
    for pfn in range(buffer + 8, buffer + 16):
        b.free_pages(pfn, cpu=0)
    for one, other in zip(a.all_zones(), b.all_zones(), strict=True):
        assert one.vm_events == other.vm_events
        assert [one.pcp_list(c, i) for c in range(2) for i in range(14)] == [
            other.pcp_list(c, i) for c in range(2) for i in range(14)
        ]
        assert [one.free_list(o, mt) for o in range(11) for mt in range(5)] == [
            other.free_list(o, mt) for o in range(11) for mt in range(5)
        ]
    a.validate()


@pytest.mark.parametrize(
    "directives",
    [
        ("cdivision=False", "boundscheck=True", "wraparound=True", "overflowcheck=True"),
        ("cdivision=True", "boundscheck=False", "initializedcheck=False", "profile=False"),
    ],
)
def test_declarations_compile_whatever_the_directives(
    tmp_path: Path, directives: tuple[str, ...]
) -> None:
    m = machine()
    assert compile_jobs(tmp_path, *directives).run(m, 1, 100, 7) == 0
    m.validate()


def test_a_bulk_request_with_a_node_mask_is_the_same_single_requests(tmp_path: Path) -> None:
    """An atomic request that fails leaves the mask; the next one begins with it again."""
    calls = compile_source(tmp_path, MASKED)
    a, b = machine(), machine()
    for order in (0, 4):
        n = 40_000 >> order
        assert calls.bulk(a, order, n, 2) == calls.singles(b, order, n, 2)
        assert a.memmap_engine.kswapd_state(0) == b.memmap_engine.kswapd_state(0)
        assert a.memmap_engine.kswapd_state(1) == b.memmap_engine.kswapd_state(1)
    a.validate()


def test_the_document_shows_the_code_that_is_compiled_here() -> None:
    text = DOC.read_text(encoding="utf-8")
    assert f"```cython\n{(SOURCES / 'jobs.pyx').read_text()}```" in text
    assert f"```python\n{(SOURCES / 'setup.py').read_text()}```" in text
