"""``python -m benchmarks [--out DIR] [pytest's options]``: run them, print one table, draw it."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

OUT = Path("build/benchmarks")


def cpu() -> str:
    """The processor's name and how many there are."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names)} CPUs"


def row_of(entry: dict[str, Any]) -> dict[str, Any]:
    """One line of the table from what pytest-benchmark has kept."""
    extra = dict(entry["extra_info"])
    row: dict[str, Any] = {"name": entry["name"].removeprefix("test_"), "group": entry["group"]}
    ns, plain = extra.pop("ns", None), extra.pop("plain ns", None)
    row["seconds"] = entry["stats"]["median"]
    row["ns"] = ns
    row["plain"] = plain
    row["ratio"] = round(ns / plain, 2) if ns and plain else None
    row["more"] = extra
    return row


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    cells = [f"{row[key]:>9.2f}" if row[key] else " " * 9 for key in ("ns", "plain", "ratio")]
    more = ", ".join(f"{k} {v}" for k, v in row["more"].items())
    return f"{row['name']:<62}{row['seconds']:>10.4f} {' '.join(cells)}  {more}"


def draw(rows: list[dict[str, Any]], path: Path) -> bool:
    """Draw kmm beside the plain buddy; whether matplotlib is there to do it."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pairs = [r for r in rows if r["ratio"]]
    if not pairs:
        return False
    figure, axes = pyplot.subplots(figsize=(9, 0.42 * len(pairs) + 1.2), layout="constrained")
    at = range(len(pairs))
    axes.barh([i - 0.2 for i in at], [r["ns"] for r in pairs], 0.4, label="kmm")
    axes.barh([i + 0.2 for i in at], [r["plain"] for r in pairs], 0.4, label="plain C buddy")
    axes.set_yticks(list(at), [r["name"] for r in pairs], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ns an operation, median of five")
    axes.legend()
    figure.savefig(path)
    return True


def main(args: list[str]) -> int:
    """Run the benchmarks and show them."""
    own = argparse.ArgumentParser(prog="python -m benchmarks", add_help=False, allow_abbrev=False)
    own.add_argument("--out", type=Path, default=OUT)
    given, args = own.parse_known_args(args)
    out: Path = given.out
    with tempfile.TemporaryDirectory() as work:
        kept = Path(work) / "benchmarks.json"
        options = ["--benchmark-enable", "--benchmark-only", "-q", f"--benchmark-json={kept}"]
        code = int(pytest.main(["benchmarks", *options, *args]))
        text = kept.read_text() if kept.exists() else ""
    if not text:
        return code
    rows = sorted((row_of(e) for e in json.loads(text)["benchmarks"]), key=lambda r: r["group"])
    where = f"{cpu()}, Python {platform.python_version()}"
    print(f"\n{where}\n{'':<62}{'seconds':>10} {'ns':>9} {'plain ns':>9} {'ratio':>9}")
    group = None
    for row in rows:
        if row["group"] != group:
            group = row["group"]
            print(f"-- {group}")
        print(line(row))
    out.mkdir(parents=True, exist_ok=True)
    (out / "benchmarks.json").write_text(json.dumps({"where": where, "rows": rows}, indent=1))
    drawn = draw(rows, out / "benchmarks.svg")
    print(f"\nwritten: {out}/benchmarks.json" + (f", {out}/benchmarks.svg" if drawn else ""))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
