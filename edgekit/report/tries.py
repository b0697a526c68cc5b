"""The tries of `export --robust-drop` as a table; made from `robust_drop` in artifact.json."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from edgekit.report import listing, words
from edgekit.statistics import points
from edgekit.verdict import Change


def to_table(record: Mapping[str, Any]) -> Table:
    """One row a try, in the order in which they were made."""
    rows = []
    for one in record["tries"]:
        kept = ", kept" if one["name"] == record["kept"] else ""
        times = " / ".join(f"{ratio:.2f}" for ratio in one["speed"].values())
        change, held = words.signed(Change(**one["change"])), "held" if one["held"] else "missed"
        rows.append((one["name"], f"{one['bytes'] / 1000:,.0f}", times, change, held + kept))
    batches = " / ".join(record["tries"][0]["speed"])
    return listing.to_table(("try", "kB", f"x fp32 at {batches}", "robust, points", ""), rows)


def closing(record: Mapping[str, Any]) -> str:
    """What came of it, and what it rests on."""
    allowed, where = points(record["allowed"]), f"{record['images']:,} {record['split']} images"
    attacks = ", ".join(record["attacks"])
    if record["held"]:
        return f"'{record['kept']}' loses at most {allowed} on {where} ({attacks}): the first of the tries that does."
    return f"No try loses at most {allowed} on {where} ({attacks}): '{record['kept']}', which loses least, is kept."
