"""The table of doctor."""

from rich.console import Console

from edgekit.report.doctor import HEADINGS, closing, to_table


def row(what: str, works: str, *, needed: bool = True, found: str = "1.0", mend: str | None = None, group="core"):
    return {"group": group, "what": what, "works": works, "needed": needed, "found": found, "mend": mend}


def shown(*rows: dict, works: bool = True, width: int = 80) -> str:
    console = Console(width=width, force_terminal=True, color_system=None)
    document = {"schema": 1, "edgekit": "0", "works": works, "seconds": 1.0, "rows": list(rows)}
    with console.capture() as capture:
        console.print(to_table(document))
        console.print(closing(document), soft_wrap=True)
    return capture.get()


def test_every_group_has_its_heading_once_and_every_row_its_line() -> None:
    text = shown(*(row(f"{number}-{n}", "yes", group=group) for number, group in enumerate(HEADINGS) for n in range(2)))
    assert all(text.count(heading) == 1 for heading in HEADINGS.values())
    assert [line.split()[0] for line in text.splitlines() if "yes" in line] == [
        f"{number}-{n}" for number in range(len(HEADINGS)) for n in range(2)
    ]
    assert "What mends it" not in text
    assert "WORKS: all that distill, export and verify need" in text


def test_a_command_that_mends_is_one_line_however_narrow_the_terminal() -> None:
    command = "pip install --force-reinstall 'onnx>=1.21' 'onnxruntime>=1.23' 'onnxscript>=0.5'"
    broken = row("onnx", "no", found="it ends its process (SIGSEGV)", mend=command)
    text = shown(broken, row("arm64", "no", needed=False), works=False, width=60)
    assert f"  onnx: {command}" in [line.rstrip() for line in text.splitlines()]
    assert "DOES NOT WORK: distill, export and verify need onnx" in " ".join(text.split())
    assert "arm64:" not in text  # nothing mends it


def test_no_name_can_style_the_terminal() -> None:
    text = shown(row("[red]x", "no", found="\x1b[31m[bold]y", mend="\x1b[2J"), works=False)
    assert "\x1b" not in text
    assert "[red]x" in text and "[bold]y" in text
