"""The commands: parse, call, print. What they do stands in the modules that they import when called."""

import errno
import json as jsonlib
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from edgekit import __version__
from edgekit.console import console, say
from edgekit.errors import BAD_INPUT, ENVIRONMENT, EdgekitError, printable

app = typer.Typer(
    help="Distil a robust image classifier, export it, and prove that its robustness arrived.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help in boxes takes three times as long: it loads parsers of Markdown and of source code
    context_settings={"help_option_names": ["-h", "--help"]},
)

_ELSEWHERE = "For a network trained elsewhere"
_FILE = "For a FILE that edgekit did not write"
# What the system says of a path that cannot be one, whatever option it stood behind.
_NO_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else there.")]


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _print_json(document: Any) -> None:
    print(jsonlib.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


@app.command()
def distill(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/mobilenet.toml.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="K=V", help="Override a key: --set train.epochs=5.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run folder.", show_default="runs/<recipe>-<n>")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps.", show_default="a GPU where there is one")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.", show_default="the recipe's")] = None,
    json: Json = False,
) -> None:
    """Train a robust student, and first its teacher if need be."""
    from edgekit.train import distill as work

    result = work(recipe, overrides=overrides or (), run=run, resume=resume, device=device, seed=seed)
    if json:
        _print_json(result)
        return
    metrics = result["metrics"]
    say(
        f"{result['run']}: validation accuracy {100 * metrics['clean_accuracy']:.1f} % clean, "
        f"{100 * metrics['robust_accuracy']:.1f} % under PGD (epoch {metrics['epoch']}); {result['seconds']:.0f} s"
    )
    target = "" if run is None else f" {result['run']}"
    say(f"Next: edgekit export{target} --int8")


@app.command()
def export(
    run: Annotated[Path | None, typer.Argument(help="A run folder.", show_default="the latest run")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Write int8 files too.")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Write fp16 files too.")] = False,
    format: Annotated[
        str | None, typer.Option(metavar="F,…", help="Names of formats (edgekit doctor lists them), or all.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(metavar="T,…", help="Places to ship to (edgekit targets), in place of --format.")
    ] = None,
    qat: Annotated[bool, typer.Option("--qat", help="Train the int8 file further; a second time continues.")] = False,
    qat_control: Annotated[
        bool, typer.Option("--qat-control", help="Train the float student in the same way too, for comparison.")
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="K=V", help="How --qat trains: qat.epochs=4; with --weights any key."),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Part of the artifact's name, to keep several side by side.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact of the same name.")] = False,
    ptq: Annotated[
        str, typer.Option(help="tuned: int8 settings chosen on validation images; plain: min-max ranges.")
    ] = "tuned",
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="With --int8: what quantizing each layer alone costs.")
    ] = False,
    robust_drop: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS", min=0, max=100, help="With --int8: the robust accuracy that may be lost on validation."
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="safetensors, or a state_dict in .pt.", rich_help_panel=_ELSEWHERE),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="mobilenetv2, resnet18, … or module:factory.", rich_help_panel=_ELSEWHERE),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Its photos, or digits, cifar10.", rich_help_panel=_ELSEWHERE)
    ] = None,
    size: Annotated[
        int | None, typer.Option(metavar="N", min=4, help="The side of its images.", rich_help_panel=_ELSEWHERE)
    ] = None,
    mean: Annotated[
        str | None, typer.Option(metavar="M,…", help="In [0, 1], RGB; 123/255 is allowed.", rich_help_panel=_ELSEWHERE)
    ] = None,
    std: Annotated[str | None, typer.Option(metavar="S,…", help="The same.", rich_help_panel=_ELSEWHERE)] = None,
    classes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its class names, to be compared.", rich_help_panel=_ELSEWHERE)
    ] = None,
    json: Json = False,
) -> None:
    """Write deployable files, each opened again and compared with the student."""
    from edgekit.exporter import export as work

    result = work(
        run,
        int8=int8,
        fp16=fp16,
        formats=format.split(",") if format else None,
        targets=target,
        ptq=ptq,
        sensitivity=sensitivity,
        robust_drop=None if robust_drop is None else robust_drop / 100,
        qat=qat,
        qat_control=qat_control,
        overrides=overrides or (),
        label=label,
        force=force,
        weights=weights,
        model=model,
        data=data,
        size=size,
        mean=mean,
        std=std,
        classes=classes,
    )
    searched = [one["robust_drop"] for one in result["artifacts"] if "robust_drop" in one]
    if json:
        _print_json(result)
    else:
        from edgekit.report import layers, tries

        for measured in (one["sensitivity"] for one in result["artifacts"] if "sensitivity" in one):
            _print(layers.to_table(measured))
            say(layers.note(measured))
        for record in searched:
            _print(tries.to_table(record))
            say(tries.closing(record))
        say(f"Next: edgekit verify{'' if run is None else f' {run}'} --attack pgd20")
    raise typer.Exit(0 if all(record["held"] for record in searched) and result["within_budget"] else 1)


@app.command()
def verify(
    what: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN|ARTIFACT|FILE",
            help="A run, an artifact folder, an ONNX or TorchScript file.",
            show_default="the latest run",
        ),
    ] = None,
    attack: Annotated[
        str, typer.Option(metavar="A,B", help="Attacks and suites (edgekit attacks); several: the worst case.")
    ] = "deployed",
    samples: Annotated[int | None, typer.Option(min=1, help="Test images.", show_default="1000 or all")] = None,
    epsilon: Annotated[
        str | None,
        typer.Option(help="Radius in [0, 1] pixels; 8/255 is allowed.", show_default="the recipe's, else 8/255"),
    ] = None,
    norm: Annotated[str, typer.Option(help="Linf or L2.")] = "Linf",
    tolerance: Annotated[
        float, typer.Option(metavar="POINTS", min=0, max=100, help="Loss of robust accuracy that is borne.")
    ] = 2.0,
    clean_tolerance: Annotated[
        float, typer.Option(metavar="POINTS", min=0, max=100, help="The same for clean accuracy.")
    ] = 2.0,
    at_least: Annotated[
        float | None, typer.Option(metavar="POINTS", min=0, max=100, help="Robust accuracy that each file must reach.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draw of samples and of every attack.")] = 0,
    save_adversarial: Annotated[Path | None, typer.Option(metavar="F.npz", help="Keep the adversarial images.")] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="Only images of uint8 values, which a camera can deliver.")
    ] = False,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Plant adversarial examples in a copy, and look whether they are found.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what was interrupted.")] = False,
    until_decided: Annotated[
        bool,
        typer.Option(
            "--until-decided", help="Draw further samples, up to --samples or all, until decided; five planned looks."
        ),
    ] = False,
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="verdict.json", help="Compare with an earlier release's file, on the same samples."),
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="F.html", help="The HTML report, with curves.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="F.md", help="The verdict for a pull request.")] = None,
    junit: Annotated[Path | None, typer.Option(metavar="F.xml", help="The verdict as JUnit XML, for CI.")] = None,
    judge: Annotated[
        str | None,
        typer.Option(metavar="CMD|tcp://HOST:PORT", help="The program or device that answers in the file's place."),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(metavar="P,…", help="Judge on these processors: native, x86-avx2, x86-sse, arm64, wasm."),
    ] = None,
    source: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="Follow this model's gradients too: safetensors or ONNX.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="FOLDER/CLASS/*.jpg: the photos.", rich_help_panel=_FILE)
    ] = None,
    mean: Annotated[
        str | None, typer.Option(metavar="M,…", help="In [0, 1], RGB; 123/255 is allowed.", rich_help_panel=_FILE)
    ] = None,
    std: Annotated[str | None, typer.Option(metavar="S,…", help="The same.", rich_help_panel=_FILE)] = None,
    layout: Annotated[str | None, typer.Option(help="nchw or nhwc.", rich_help_panel=_FILE)] = None,
    channels: Annotated[str | None, typer.Option(help="rgb or bgr.", rich_help_panel=_FILE)] = None,
    output: Annotated[str | None, typer.Option(metavar="NAME", help="The scores.", rich_help_panel=_FILE)] = None,
    classes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Class names, one a line or JSON.", rich_help_panel=_FILE)
    ] = None,
    resize: Annotated[
        bool, typer.Option("--resize", help="Crop and resize the photos to the file's size.", rich_help_panel=_FILE)
    ] = False,
    size: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Their side, where the file takes any size.", rich_help_panel=_FILE),
    ] = None,
    trust_file: Annotated[
        bool, typer.Option("--trust-file", help="TorchScript is code: let the file's run.", rich_help_panel=_FILE)
    ] = False,
    skip_unavailable: Annotated[
        bool, typer.Option("--skip-unavailable", help="Files that cannot run here do not fail the verdict.")
    ] = False,
    json: Json = False,
) -> None:
    """Attack exported files in their own runtimes and say whether the robustness survived."""
    from edgekit import verdict, verifier

    typed = shlex.join(["edgekit", *sys.argv[1:]])

    document = verifier.verify(
        what,
        attack=attack,
        samples=samples,
        epsilon=epsilon,
        norm=norm,
        tolerance=tolerance / 100,
        clean_tolerance=clean_tolerance / 100,
        at_least=None if at_least is None else at_least / 100,
        seed=seed,
        grid=grid,
        self_test=self_test,
        resume=resume,
        until_decided=until_decided,
        baseline=baseline,
        save_adversarial=save_adversarial,
        report=report,
        markdown=markdown,
        junit=junit,
        judge=judge,
        on=on,
        command=typed,
        source=source,
        data=data,
        mean=mean,
        std=std,
        layout=layout,
        channels=channels,
        output=output,
        classes=classes,
        resize=resize,
        size=size,
        trust_file=trust_file,
        skip_unavailable=skip_unavailable,
    )
    if console.quiet:  # process 0 speaks for all
        pass
    elif json:
        _print_json(document)
    else:
        from edgekit.report import terminal

        _print(terminal.to_table(verdict.from_dict(document)))
    raise typer.Exit(0 if document["passed"] else verdict.EXIT[document["verdict"]])


@app.command()
def bench(
    what: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN|ARTIFACT|FILE]…",
            help="Runs, artifact folders, ONNX files; several are compared.",
            show_default="the latest run",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at once, measured beside one alone.")] = 32,
    threads: Annotated[
        str | None, typer.Option(metavar="N,…", help="Of one inference.", show_default="1, 2, 4, … and all cores")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each file; fewer where they take long.")] = 200,
    json: Json = False,
) -> None:
    """Measure latency, throughput, cold start, memory and size of exported files on this machine."""
    from edgekit.bencher import bench as work

    document = work(what, batch=batch, threads=threads, rounds=rounds)
    if json:
        _print_json(document)
        return
    from edgekit.report import bench as shown

    _print(shown.to_table(document))
    say(shown.closing(document))


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A model file, an artifact or a run folder.")], json: Json = False
) -> None:
    """Say what a model file is and how it was made; nothing of it is run."""
    from edgekit import inspector

    document = inspector.inspect(file)
    if json:
        _print_json(document)
    else:
        from edgekit.report import listing

        _print(listing.facts(document))


@app.command()
def attacks(json: Json = False) -> None:
    """List the attacks and suites that `verify --attack` takes."""
    from edgekit.attacks import ATTACKS
    from edgekit.attacks.suites import SUITES

    suites = {name: f"all of: {members}" for name, members in SUITES.items()}
    rows = [{"name": name, "does": does} for name, does in (ATTACKS | suites).items()]
    _list(json, rows, "The numbers in a name are free: pgd50x3-margin is 50 steps from 3 starts on the margin loss.")


@app.command()
def methods(json: Json = False) -> None:
    """List the training methods that a recipe names in its table "method"."""
    from edgekit.methods import METHODS

    rows = [
        {
            "name": name,
            "teacher": "needed" if method.needs_teacher else "none",
            "options": ", ".join(method.options) or "none",
            "paper": method.paper,
        }
        for name, method in METHODS.items()
    ]
    _list(json, rows, 'A recipe names one: [method] name = "rslad"')


@app.command()
def targets(json: Json = False) -> None:
    """List the places that `export --target` writes files for."""
    from edgekit import target

    document = target.document()
    if json:
        _print_json(document)
    else:
        _list(False, target.rows(document), "Your own: export/NAME.toml in the working directory, which comes first.")


@app.command()
def doctor(json: Json = False) -> None:
    """Try what works on this machine, and say what mends the rest; nothing is installed."""
    from edgekit import doctor as work

    document = work.examine()
    if json:
        _print_json(document)
    else:
        from edgekit.report import doctor as report

        _print(report.to_table(document))
        _print(report.closing(document), soft_wrap=True)
    raise typer.Exit(0 if document["works"] else ENVIRONMENT)


def _list(json: bool, rows: list[dict[str, str]], note: str) -> None:
    if json:
        _print_json(rows)
        return
    from edgekit.report import listing

    _print(listing.to_table(list(rows[0]), [list(row.values()) for row in rows]))
    say(note)


def _print(table: Any, *, soft_wrap: bool = False) -> None:
    from rich.console import Console

    Console().print(table, soft_wrap=soft_wrap)


def _leave(message: str, code: int) -> NoReturn:
    console.print(
        f"edgekit: {printable(message)}", markup=False, soft_wrap=True, style="bold red" if code != 130 else None
    )
    _exit(code)


def _exit(code: int) -> NoReturn:
    """Where a launcher started several processes they end together."""
    if crew := sys.modules.get("edgekit.crew"):
        crew.leave(code)
    elif console.quiet:
        time.sleep(1)  # a launcher that sees one process fail ends all: process 0 first says its sentence
    sys.exit(code)


def main() -> None:
    """Run the command line; every expected fault ends in one sentence and the exit code that CLI.md gives it."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # How long the threads of libgomp spin for their next piece of work, read when torch is loaded. By default they
        # spin for so long that two busy jobs on two cores slow each other down: benchmarks/spin.py.
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        code = app(standalone_mode=False)  # not standalone, so that faults reach the clauses below; Exit is returned
        _exit(code if isinstance(code, int) else 0)
    except EdgekitError as error:
        _leave(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _leave("interrupted", 130)
    except MemoryError:
        _leave("out of memory", ENVIRONMENT)
    except OSError as error:
        if error.errno not in (*_NO_PATH, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        code = BAD_INPUT if error.errno in _NO_PATH else ENVIRONMENT
        _leave(f"{error.filename or 'the disk'}: {error.strerror}", code)
    except Exception as error:
        if (shown := getattr(error, "format_message", None)) is None:
            raise
        _leave(f"{shown()} Try: edgekit --help", 2)  # the parser's own usage errors
