"""``python -m benchmarks``: run them all and print the table."""

import sys

import pytest

sys.exit(pytest.main(["benchmarks", "--benchmark-enable", "--benchmark-only", "-q", *sys.argv[1:]]))
