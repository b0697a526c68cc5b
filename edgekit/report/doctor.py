"""What `edgekit doctor` found, as a table for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from edgekit.report.words import plain

HEADINGS = {
    "core": "packages",
    "machine": "this machine",
    "formats": "formats",
    "emulated": "emulated (--on)",
    "data": "data sets",
}
_COLOURS = {"yes": "green", "no": "yellow", "not needed": "dim"}


def to_table(document: Mapping[str, Any]) -> Table:
    """The rows by group; no name in them can style the output."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column("what", no_wrap=True)
    table.add_column("works", no_wrap=True)
    table.add_column("found", overflow="fold")
    above = ""
    for row in document["rows"]:
        if row["group"] != above:
            above = row["group"]
            table.add_section()
            table.add_row(Text(HEADINGS[above], style="bold"))
        table.add_row(Text(f"  {plain(row['what'])}"), _works(row), Text(plain(row["found"])))
    return table


def closing(document: Mapping[str, Any]) -> Text:
    """What mends the rows, and the answer in words; to be printed unwrapped, because commands are copied from it."""
    rows = [row for row in document["rows"] if row["works"] == "no" and row["mend"]]
    text = Text()
    if rows:
        text.append("\nWhat mends it\n", style="bold")
    for row in rows:
        text.append(f"  {plain(row['what'])}: ").append(f"{plain(row['mend'])}\n", style="cyan")
    broken = [row["what"] for row in document["rows"] if row["needed"] and row["works"] == "no"]
    tried = f"edgekit {document['edgekit']}, tried in {document['seconds']:.0f} s"
    if not broken:
        text.append("\nWORKS", style="bold green")
        return text.append(f": all that distill, export and verify need ({tried})")
    text.append("\nDOES NOT WORK", style="bold red")
    return text.append(f": distill, export and verify need {plain(', '.join(broken))} ({tried})")


def _works(row: Mapping[str, Any]) -> Text:
    broken = row["needed"] and row["works"] == "no"
    return Text(row["works"], style="bold red" if broken else _COLOURS[row["works"]])
