"""What the benchmarks share: the form of a result, the table for people, the JSON document, the start of a program."""

import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import edgekit
from edgekit import machine, shipped
from edgekit.console import console, say
from edgekit.errors import BAD_INPUT, EdgekitError, printable
from edgekit.files import digest, sha256


@dataclass(frozen=True)
class Row:
    """One comparison: `ratio` above 1 means that edgekit is better; `goal` is its smallest value, None where there is
    no goal or where it stands in points in `what`."""

    what: str
    ours: float | None
    peer: float | None
    peer_name: str | None
    ratio: float | None
    goal: float | None
    unit: str


def about_machine(**more: Any) -> dict[str, Any]:
    """What the figures depend on, as it stands in every benchmark's document."""
    return {
        "cpu": machine.processor(),
        "int8_instructions": machine.int8_instructions(),
        "cores": machine.cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in ("edgekit", "torch", "onnxruntime")}
        | {"python": platform.python_version()},
        **more,
    }


def document(
    benchmark: str, rows: Sequence[Row], about: dict[str, Any] | None = None, *, quick: bool, **more: Any
) -> dict[str, Any]:
    """The one document of a benchmark, as CLI.md fixes it; `more` is what else it measured."""
    about = about_machine() if about is None else about
    return {"benchmark": benchmark, "machine": about, "quick": quick, "rows": [asdict(row) for row in rows], **more}


def publish(result: dict[str, Any], *, as_json: bool, show: Callable[[Console], None] | None = None) -> None:
    """Print the table on stdout; with `as_json` the document stands there and the table goes to stderr.

    Args:
        show: prints what the table of rows has no place for, before it.
    """
    people = console if as_json else Console(highlight=False)
    if result["quick"]:
        people.print("Quick: few repetitions or a short training. These figures show that it works, not how well.")
    if show:
        show(people)
    people.print(table(result))
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False))


def table(result: dict[str, Any]) -> Table:
    """The rows of a document; no name in them can style the output."""
    drawn = Table(title=Text(f"{result['benchmark']} on {printable(result['machine']['cpu'])}"), box=box.SIMPLE_HEAD)
    drawn.add_column("what", overflow="fold")
    for name in ("edgekit", "peer"):
        drawn.add_column(name, justify="right")
    drawn.add_column("the peer is", overflow="fold")
    for name in ("ratio", "goal"):
        drawn.add_column(name, justify="right")
    for row in result["rows"]:
        goal = "–"
        if row["goal"] is not None:
            goal = (
                f"{row['goal']:g} {'reached' if row['ratio'] is not None and row['ratio'] >= row['goal'] else 'missed'}"
            )
        cells = (
            f"{row['what']} [{row['unit']}]",
            figure(row["ours"]),
            figure(row["peer"]),
            row["peer_name"] or "–",
            figure(row["ratio"]),
            goal,
        )
        drawn.add_row(*(Text(printable(cell)) for cell in cells))
    return drawn


def figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def made_with(*recipes: str) -> dict[str, Any]:
    """What decides the figures of a benchmark that trains: the recipes' content, and every source of the package."""
    root = Path(edgekit.__file__).parent
    sources = sorted(root.rglob("*.py"))
    code = digest(*(part for path in sources for part in (str(path.relative_to(root)), path.read_bytes())))
    return {"recipes": {name: sha256(shipped.find(name, "recipes")) for name in recipes}, "code": code}


def read_state(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What an interrupted benchmark kept in `path`; a new state where there is none.

    Raises:
        EdgekitError: the file is damaged, or was written with other settings.
    """
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"settings": settings}
    except ValueError:
        raise EdgekitError("not valid JSON", where=path, mend="Remove it to start again") from None
    if not isinstance(state, dict) or state.get("settings") != settings:
        before = state.get("settings", {}) if isinstance(state, dict) else {}
        other = ", ".join(sorted(key for key in {*settings, *before} if settings.get(key) != before.get(key)))
        raise EdgekitError(f"what is kept here was made with other settings ({other})", where=path, mend="Name another")
    return state


def start(main: Callable[..., None]) -> None:
    """Run `main` as a command line; bad input ends in one sentence, as edgekit's own does."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(context_settings={"help_option_names": ["-h", "--help"]})(main)
    try:
        app()
    except EdgekitError as error:
        say(f"{Path(sys.argv[0]).name}: {error}")
        sys.exit(getattr(error, "exit_code", BAD_INPUT))
