"""Directives that print kmm.symbols: kernel functions, and what failures leave behind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from kmm.symbols import LEFT_BEHIND, SYMBOLS, Symbol

HEAD = {"function": 28, "status": 10, "where": 26, "older names, what differs": 36}


def _table(rows: Iterable[Sequence[list[nodes.Node]]]) -> nodes.table:
    table = nodes.table(classes=["colwidths-given"])
    group = nodes.tgroup(cols=len(HEAD))
    table += group
    for width in HEAD.values():
        group += nodes.colspec(colwidth=width)
    first = nodes.row()
    for text in HEAD:
        first += nodes.entry("", nodes.paragraph(text=text))
    group += nodes.thead("", first)
    body = nodes.tbody()
    for row in rows:
        line = nodes.row()
        for cell in row:
            line += nodes.entry("", nodes.paragraph("", "", *cell))
        body += line
    group += body
    return table


def _row(symbol: Symbol) -> list[list[nodes.Node]]:
    more: list[nodes.Node] = []
    for name in symbol.older:
        more += [nodes.literal(text=name), nodes.Text(" ")]
    where = [nodes.Text(f"{symbol.file}; "), nodes.literal(text=symbol.module)]
    return [
        [nodes.literal(text=symbol.name)],
        [nodes.Text(symbol.status)],
        where,
        [*more, nodes.Text(symbol.note)],
    ]


class KernelFunctions(SphinxDirective):
    """The kernel functions of one status, or of all: name, file, module, older names, note."""

    optional_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {}

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        wanted = self.arguments[0].split(",") if self.arguments else None
        known = {symbol.status for symbol in SYMBOLS}
        if wanted is not None and not set(wanted) <= known:
            raise self.error(f"status {self.arguments[0]}; allowed: {', '.join(sorted(known))}")
        chosen = [s for s in SYMBOLS if wanted is None or s.status in wanted]
        rows = [_row(s) for s in sorted(chosen, key=lambda s: (s.file, s.name))]
        return [_table(rows)]


class LeftBehind(SphinxDirective):
    """What the kernel leaves behind after a failure where a user can see it."""

    def run(self) -> list[nodes.Node]:
        """Return the list."""
        out = nodes.bullet_list()
        for failure, stays in LEFT_BEHIND.items():
            out += nodes.list_item("", nodes.paragraph(text=f"{failure}: {stays}"))
        return [out]


def setup(app: Any) -> dict[str, Any]:
    """Make the directives known to Sphinx."""
    app.add_directive("kernel-functions", KernelFunctions)
    app.add_directive("left-behind", LeftBehind)
    return {"parallel_read_safe": True}
