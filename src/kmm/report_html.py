"""A run as one self-contained HTML page: data, style, script and charting library inside."""

from __future__ import annotations

import contextlib
import html
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

from kmm.errors import ConfigError

#: The page's scripts in kmm/report, one after the other in one scope.
_SCRIPTS = ("common.js", "map.js", "charts.js", "tables.js", "page.js")
#: What the process does that puts the charting library together.
_BUNDLE = """\
import sys, vl_convert
sys.stdout.reconfigure(encoding="utf-8", newline="")
sys.stdout.write(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))
"""
#: What the process does that puts the charting library together.
_BUNDLE = """\
import sys, vl_convert
sys.stdout.reconfigure(encoding="utf-8", newline="")
sys.stdout.write(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))
"""


def charting_library() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script, which vl-convert carries.

    Putting it together takes seconds in which vl-convert hears no signal.  So a process of its own
    does it, which an interrupt ends, and the script is kept in the user's cache directory, by
    vl-convert's version.

    :raises ConfigError: if vl-convert is not installed, or fails.
    """
    if find_spec("vl_convert") is None:
        raise ConfigError("a report needs vl-convert-python; install kmm[report]")
    kept = cache_directory() / f"vega-{version('vl-convert-python')}.js"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return kept.read_text(encoding="utf-8")
    script = _bundle()
    # Without a place to keep it, the next report waits again.
    with contextlib.suppress(OSError):
        _keep(kept, script)
    return script


def cache_directory() -> Path:
    """Return where kmm keeps what can be made again: ``kmm`` in the XDG base directory for it."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path("~/.cache").expanduser()) / "kmm"


def _bundle() -> str:
    command = [sys.executable, "-c", _BUNDLE]
    made = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if made.returncode:
        said = made.stderr.strip().rpartition("\n")[2] or f"exit status {made.returncode}"
        raise ConfigError(f"vl-convert-python makes no charting library: {said}")
    return made.stdout


def _keep(path: Path, text: str) -> None:
    """Write a file such that others see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as f:
        try:
            f.write(text)
            f.flush()
            os.replace(f.name, path)
        except BaseException:
            os.unlink(f.name)
            raise


def in_script(text: str) -> str:
    """Return JSON such that nothing in it ends or opens a script element."""
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _part(name: str) -> str:
    return files("kmm").joinpath("report", name).read_text(encoding="utf-8")


def report_html(run: Mapping[str, Any], library: str | None = None) -> str:
    """Return a report of a run as an HTML page, which loads nothing from anywhere.

    :param run: see report_data; library: the charting library's script, the one of vl-convert if
        None.
    :raises ConfigError: if there is no charting library.
    """
    script = charting_library() if library is None else library
    code = "".join(map(_part, _SCRIPTS))
    return Template(_part("page.html")).substitute(
        title=html.escape(run["title"]),
        style=_part("page.css"),
        run=in_script(json.dumps(run, separators=(",", ":"))),
        library=script.replace("</script", "<\\/script"),
        script=f'(() => {{\n"use strict";\n{code}}})();',
    )
