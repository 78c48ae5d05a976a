"""Builds the simulator; the declarations of kmm are found where kmm is installed."""

from Cython.Build import cythonize
from setuptools import Extension, setup

setup(
    name="jobs",
    ext_modules=cythonize([Extension("jobs", ["jobs.pyx"])], language_level=3),
)
