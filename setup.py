"""Builds the engine's extensions; everything else is in pyproject.toml."""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("KMM_DEBUG") == "1"
DIRECTIVES = {
    "language_level": 3,
    "boundscheck": DEBUG,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": DEBUG,
    "embedsignature": True,
}
MODULES = """_memmap _fallback _pcp _page_alloc _free_pages _allocator _buddy _scan _page_flags
    _watermarks _swap _swapfile _memory _migrate _filemap _vmscan _hugetlb _contig_alloc
    _page_owner _page_ref _compaction_scan _compaction _fragment
    _mempolicy _workload _tokens _recount _fuse_names _fusefs""".split()
FLAGS = ["-O1", "-g", "-DKMM_DEBUG=1"] if DEBUG else ["-O3"]

# What typed memoryviews need is compiled once, not into each module that has some.
SHARED = "kmm._cyutility"
SOURCES = {f"kmm.{name}": f"src/kmm/{name}.pyx" for name in MODULES} | {
    SHARED: "src/kmm/_cyutility.c"
}
CORES = os.cpu_count() or 1

setup(
    options={"build_ext": {"parallel": CORES}},
    ext_modules=cythonize(
        [Extension(name, [source], extra_compile_args=FLAGS) for name, source in SOURCES.items()],
        compiler_directives=DIRECTIVES,
        include_path=["src"],
        build_dir="build/cython",
        shared_utility_qualified_name=SHARED,
        nthreads=CORES,
    ),
)
