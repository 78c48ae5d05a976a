"""A run as one self-contained HTML page: data, style, script and charting library inside."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from importlib.resources import files
from string import Template
from typing import Any

from kmm.errors import ConfigError

#: The page's scripts in kmm/report, one after the other in one scope.
_SCRIPTS = ("common.js", "map.js", "charts.js", "tables.js", "page.js")


def charting_library() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script, which vl-convert carries.

    :raises ConfigError: if vl-convert is not installed.
    """
    try:
        import vl_convert
    except ImportError:
        raise ConfigError("a report needs vl-convert-python; install kmm[report]") from None
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


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
