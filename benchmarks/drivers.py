"""Builds the Cython drivers of the workloads against the installed kmm, once a session."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent

_BUILD = """
from Cython.Build import cythonize
from setuptools import Extension, setup

setup(
    name="drivers",
    ext_modules=cythonize(
        Extension(
            "_drivers", ["_drivers.pyx"], include_dirs=[{here!r}], extra_compile_args=["-O3"]
        ),
        build_dir="c",
        quiet=True,
    ),
)
"""


@functools.cache
def drivers() -> ModuleType:
    """Return the compiled module; what the compiler says is shown if it fails."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "_drivers.pyx").write_bytes((HERE / "_drivers.pyx").read_bytes())
        (work / "setup.py").write_text(_BUILD.format(here=str(HERE)))
        built = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=work,
            capture_output=True,
            text=True,
            check=False,
        )
        if built.returncode:
            raise RuntimeError(f"the benchmark drivers do not build:\n{built.stderr}")
        spec = importlib.util.spec_from_file_location("_drivers", next(work.glob("_drivers.*.so")))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
