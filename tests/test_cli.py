"""What the command line says of itself."""

import pytest
from typer.testing import CliRunner

from edgekit.cli import app


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("distill", ["runs/<recipe>-<n>", "a GPU where there is one", "the recipe's"]),
        ("export", ["the latest run"]),
        ("verify", ["the latest run", "1000 or all", "the recipe's, else 8/255", "[0, 1]"]),
        ("methods", ['table "method"']),
    ],
)
def test_help_says_every_default(name: str, said: list[str]):
    """Brackets in a help text are markup to the terminal, which leaves out what it cannot read as such."""
    shown = CliRunner(env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).invoke(app, [name, "--help"])
    assert shown.exit_code == 0
    for words in said:
        assert words in shown.output
