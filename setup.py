"""Builds the engine's extensions; everything else is in pyproject.toml."""

import os
from hashlib import sha256
from pathlib import Path

import Cython
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
# Python's own flags often ask for symbols, with which the compiler takes twice as long.
FLAGS = ["-O1", "-g1", "-DKMM_DEBUG=1"] if DEBUG else ["-O3", "-g0"]

# What typed memoryviews need is compiled once, not into each module that has some.
SHARED = "kmm._cyutility"
SOURCES = {f"kmm.{name}": f"src/kmm/{name}.pyx" for name in MODULES} | {
    SHARED: "src/kmm/_cyutility.c"
}
CORES = os.cpu_count() or 1
BUILD = Path("build/cython")


def fingerprints() -> list[str]:
    """Of how C is generated, and of what."""
    how = sha256(f"{Cython.__version__} {DIRECTIVES} {SOURCES}".encode())
    what = sha256()
    for source in sorted(Path("src/kmm").glob("*.p[yx][xd]")):
        what.update(f"{source} {sha256(source.read_bytes()).hexdigest()}".encode())
    return [how.hexdigest(), what.hexdigest()]


def extensions(of_c: bool) -> list[Extension]:
    """One for each module, of Cython's source or of the C made of it."""
    return [
        Extension(
            name,
            [str((BUILD / source).with_suffix(".c")) if of_c else source],
            extra_compile_args=FLAGS,
        )
        for name, source in SOURCES.items()
    ]


def generated() -> list[Extension]:
    """C that was generated of these very sources, or is now.

    Cython goes by times of change, and its own files are new in each environment that pip
    builds in: a second installation would generate all anew, and so compile all anew.
    """
    stamp, now = BUILD / "fingerprints", fingerprints()
    before = stamp.read_text().split() if stamp.is_file() else []
    made = extensions(of_c=True)
    if before == now and all(Path(e.sources[0]).is_file() for e in made):
        return made
    stamp.unlink(missing_ok=True)
    done: list[Extension] = cythonize(
        extensions(of_c=False),
        compiler_directives=DIRECTIVES,
        include_path=["src"],
        build_dir=str(BUILD),
        shared_utility_qualified_name=SHARED,
        nthreads=CORES,
        force=before[:1] != now[:1],
    )
    stamp.write_text("\n".join(now))
    return done


setup(options={"build_ext": {"parallel": CORES}}, ext_modules=generated())
