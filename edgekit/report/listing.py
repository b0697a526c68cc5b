"""Lists for the terminal: names with what they mean, and the facts of one thing."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from edgekit.errors import printable

ONE_BY_ONE = 6  # entries of several facts each that are shown; what is longer drowns the rest


def to_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Plain columns; no name in a row can style the output."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def facts(document: Mapping[str, Any]) -> Table:
    """A nested document, one line a fact, inner keys after their outer ones."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in _flat(document):
        table.add_row(Text(printable(key)), Text(printable(value)))
    return table


def _flat(document: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, str]]:
    for key, value in document.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        elif isinstance(value, list | tuple) and not any(isinstance(item, Mapping) for item in value):
            shown = ", ".join(map(str, value[:12])) + (f", … ({len(value)})" if len(value) > 12 else "")
            yield name, shown
        elif isinstance(value, list | tuple) and len(value) > ONE_BY_ONE:
            yield name, f"{len(value)} entries, which --json shows"
        elif isinstance(value, list | tuple):
            for number, item in enumerate(value):
                yield from _flat(item, f"{name}.{number}.")
        elif value is not None:
            yield name, str(value)
