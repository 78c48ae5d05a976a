"""Builds the engine's extensions; everything else is in pyproject.toml."""

import json
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


def how() -> str:
    """Fingerprint of how C is generated and compiled, and of which modules there are."""
    return sha256(f"{Cython.__version__} {DIRECTIVES} {FLAGS} {SOURCES}".encode()).hexdigest()


def files() -> dict[str, str]:
    """Fingerprints of what C is generated of, by name."""
    found = sorted(Path("src/kmm").glob("*.p[yx][xd]"))
    return {str(path): sha256(path.read_bytes()).hexdigest() for path in found}


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
    stamp, now = BUILD / "fingerprints.json", {"how": how(), "files": files()}
    before = json.loads(stamp.read_text()) if stamp.is_file() else {"how": "", "files": {}}
    made = extensions(of_c=True)
    if before == now and all(Path(e.sources[0]).is_file() for e in made):
        return made
    stamp.unlink(missing_ok=True)
    for path, found in now["files"].items():
        if before["files"].get(path) != found:
            os.utime(path)  # a file put back or unpacked may be older than the C of another one
    done: list[Extension] = cythonize(
        extensions(of_c=False),
        compiler_directives=DIRECTIVES,
        include_path=["src"],
        build_dir=str(BUILD),
        shared_utility_qualified_name=SHARED,
        nthreads=CORES,
        force=before["how"] != now["how"] or before["files"].keys() != now["files"].keys(),
    )
    stamp.write_text(json.dumps(now))
    return done


setup(options={"build_ext": {"parallel": CORES}}, ext_modules=generated())
