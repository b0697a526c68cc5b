"""Lists for the terminal."""

from rich.console import Console

from edgekit.report.listing import facts, to_table


def shown(table) -> str:
    console = Console(width=100, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_nested_facts_are_a_line_each_and_long_lists_are_cut() -> None:
    text = shown(facts({"a": {"b": 1, "c": None}, "l": list(range(20)), "m": [{"x": 2}]}))
    assert [line.split() for line in text.splitlines()[:1]] == [["a.b", "1"]]
    assert "a.c" not in text
    assert "11, … (20)" in text
    assert "m.0.x" in text


def test_names_cannot_style_the_terminal() -> None:
    text = shown(to_table(["name"], [["[red]x[/red]\x1b[31m"]])) + shown(facts({"\x1b[2J": "[bold]y"}))
    assert "\x1b" not in text
    assert "[red]x[/red]" in text and "[bold]y" in text
