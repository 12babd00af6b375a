"""The commands, their options and their help. Each command's work is a module of its own.

torch takes seconds to import, so those modules are imported when their command runs: help and usage errors do not wait.
"""

from __future__ import annotations

import contextlib
import difflib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import nxfx
from nxfx.cli import console
from nxfx.cli.options import (
    REPORT_FORMATS,
    Output,
    PipelineText,
    Preparation,
    Ranges,
    ReportFormat,
    Sdk,
    Spec,
    TargetName,
    Traceback,
)
from nxfx.errors import UsageError

EXIT_CODES = "Exit codes: 0 done; 1 the model failed, check found errors or verify a difference; 2 wrong usage; 130 interrupted."


FORMATS = ("code", "text", "table", "json", "dot")
DIALECTS = ("stablehlo", "hlo")
WEIGHTS = ("arguments", "inline")
REFERENCES = ("fp64", "fp32")
AUTOCASTS = ("none", "matmult", "all")
CAST_TYPES = ("bf16", "fp16", "tf32", "fp8_e4m3")


class Commands(TyperGroup):
    """Tells a usage error in one line, and knows the nearest name."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, ValueError):  # not a text file of ours
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        kwargs["standalone_mode"] = False
        kwargs["prog_name"] = "nxfx"
        try:
            code = super().main(*args, **kwargs)
        except (typer.Abort, KeyboardInterrupt):
            console.say("interrupted")
            code = console.INTERRUPTED
        except Exception as error:
            if not hasattr(error, "format_message"):  # not one of typer's own
                raise
            command = getattr(getattr(error, "ctx", None), "command_path", "nxfx")
            told = str(error.format_message()).rstrip(".")
            console.say(f"{told}. Try '{command} --help'.", command=command)
            code = console.USAGE
        sys.exit(code if isinstance(code, int) else 0)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name not in self.commands and not name.startswith("-"):
            near = difflib.get_close_matches(name, self.commands, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" There are: {', '.join(self.commands)}."
            ctx.fail(f"no command {name!r}.{hint}")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="[bold]Start here[/]\n\n\b\n"
    "nxfx check model.py:tiny          what would go wrong on Neuron, and where\n"
    "nxfx dump model.py:tiny --diff    what nxfx changes\n"
    "nxfx lower model.py:tiny          what goes to the compiler, lowered\n"
    "nxfx verify model.py:tiny         is it still my model, and if not, which line\n"
    "nxfx passes                       what the passes are\n"
    "nxfx doctor                       what this machine can compile for",
)

@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Cleans a PyTorch model's graph before AWS Neuron compiles it, so that the device computes what the author wrote.

    A model is named by a SPEC: package.module:factory, path/file.py:factory or a .pt2 file. The factory takes
    nothing and returns model, (model, args) or (model, args, kwargs).
    """
    if version:
        console.emit(f"nxfx {nxfx.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        console.emit(context.get_help())


@app.command(epilog=EXIT_CODES)
def dump(
    spec: Spec,
    format: Annotated[
        str,
        typer.Option(
            "--format", "-f", metavar="|".join(FORMATS), help="code: Python. text: a terse line a node. dot: Graphviz."
        ),
    ] = "code",
    diff: Annotated[
        bool, typer.Option("--diff", help="Show what changed, as a unified diff (code and text only).")
    ] = False,
    print_after: Annotated[
        str | None,
        typer.Option(
            "--print-after",
            metavar="changed|all|PASS",
            show_default=False,
            help="Also show the graph after each pass that changed it, after every pass, or after one pass "
            "('capture': before any).",
        ),
    ] = None,
    pipeline: PipelineText = None,
    target: TargetName = "trn2",
    sdk: Sdk = None,
    ranges: Ranges = None,
    output: Output = None,
    traceback: Traceback = False,
) -> None:
    """Show the cleaned graph: the one that goes to the compiler.

    [bold]Examples[/]

    \b
    nxfx dump model.py:tiny                       the graph as Python
    nxfx dump model.py:tiny --diff                what the passes changed
    nxfx dump model.py:tiny --diff --print-after changed
                                                  ... pass by pass
    nxfx dump model.py:tiny -f table --pipeline narrow-64bit
                                                  one pass alone, as a table
    nxfx dump model.py:tiny --pipeline ''         the graph as captured
    nxfx dump saved.pt2 -f dot -o graph.dot       a saved program, for Graphviz
    """
    with console.reported("dump", traceback):
        console.choose("format", format, FORMATS)
        if diff and format not in ("code", "text"):
            raise UsageError(f"--diff goes with --format code or text, not {format}")
        from nxfx.cli import dump

        how = Preparation(pipeline, target, sdk, console.ranges(ranges or ()))
        console.check_writable(output)
        console.emit(dump.run(dump.Request(spec, format, diff, print_after), how), output, paint=console.paint_diff if diff else None)


@app.command(epilog=EXIT_CODES)
def check(
    spec: Spec,
    format: ReportFormat = "text",
    strict_warnings: Annotated[bool, typer.Option("--strict-warnings", help="Exit 1 on warnings too.")] = False,
    variations: Annotated[int, typer.Option("--variations", min=0, help="On how many other inputs the model also runs.")] = 1,
    pipeline: PipelineText = None,
    target: TargetName = "trn2",
    sdk: Sdk = None,
    ranges: Ranges = None,
    output: Output = None,
    traceback: Traceback = False,
) -> None:
    """Report what would go wrong on Neuron: each finding with its code, your file and line, and a fix. Changes nothing.

    Exits 1 when there are error findings, 0 when there are only warnings.

    [bold]Examples[/]

    \b
    nxfx check model.py:tiny
    nxfx check mypackage.models:llama --target trn1 --sdk 2.31 --range input_ids=0:128255
    nxfx check model.py:tiny --format json -o report.json
    """
    with console.reported("check", traceback):
        console.choose("format", format, REPORT_FORMATS)
        from nxfx.cli import check

        console.check_writable(output)
        result = check.run(spec, Preparation(pipeline, target, sdk, console.ranges(ranges or ())), variations)
        text = result.report.to_json() if format == "json" else str(result.report)
        console.emit(text, output, paint=console.paint_report if format == "text" else None)
        if result.error is not None:
            raise result.error
        if result.report.errors or (strict_warnings and result.report.warnings):
            raise typer.Exit(console.FAILED)


@app.command(epilog=EXIT_CODES)
def lower(
    spec: Spec,
    to: Annotated[
        str,
        typer.Option("--to", metavar="|".join(DIALECTS), help="stablehlo: through torch-mlir. hlo: through torch-xla."),
    ] = "stablehlo",
    weights: Annotated[
        str,
        typer.Option(
            "--weights",
            metavar="|".join(WEIGHTS),
            help="arguments: the program takes the weights before the inputs. inline: it holds them (stablehlo only).",
        ),
    ] = "arguments",
    pipeline: PipelineText = None,
    target: TargetName = "trn2",
    sdk: Sdk = None,
    ranges: Ranges = None,
    output: Output = None,
    traceback: Traceback = False,
) -> None:
    """Lower the cleaned graph with the real upstream compilers, without Neuron hardware: the program that would go on to Neuron.

    The program goes to -o FILE or to standard output (a FILE that ends in .mlirbc is MLIR bytecode); a summary goes to
    standard error: how many operations there are, which of them Neuron handles badly (scatter, gather, sort, custom calls,
    64-bit), and the lines of the model that they come from.

    Exits 1 when the compiler refuses the graph, and names the operation and your line.

    [bold]Examples[/]

    \b
    nxfx lower model.py:tiny -o tiny.mlir             StableHLO, weights as arguments
    nxfx lower model.py:tiny --weights inline -o tiny.mlirbc
                                                      ... weights inside, as MLIR bytecode
    nxfx lower model.py:tiny --to hlo -o tiny.hlo     HLO, as legacy torch-neuronx compiles it
    nxfx lower model.py:tiny --pipeline ''            the graph as captured, to compare
    """
    with console.reported("lower", traceback):
        console.choose("lowering", to, DIALECTS)
        console.choose("--weights", weights, WEIGHTS)
        from nxfx.cli import lower

        console.check_writable(output)
        lowered = lower.run(spec, to, weights, Preparation(pipeline, target, sdk, console.ranges(ranges or ())))
        if output is not None and output.suffix == ".mlirbc":
            lowered.write(output)
        else:
            console.emit(lowered.text, output)
        console.note(lowered.summary())


@app.command(epilog=EXIT_CODES)
def verify(
    spec: Spec,
    candidate: Annotated[
        str | None,
        typer.Option(
            "--candidate",
            metavar="SPEC|FILE",
            show_default=False,
            help="What should compute the same: a SPEC, a saved prepared model (.pt2), or saved outputs (.pt, .npz). "
            "Default: the model as nxfx prepares it.",
        ),
    ] = None,
    captures: Annotated[
        Path | None,
        typer.Option(
            "--captures", metavar="FILE|DIR", show_default=False, help="The candidate's tensors by node or module name, from a device."
        ),
    ] = None,
    reference: Annotated[
        str, typer.Option("--reference", metavar="|".join(REFERENCES), help="The precision that errors are measured against.")
    ] = "fp64",
    autocast: Annotated[
        str | None,
        typer.Option(
            "--autocast",
            metavar="|".join(AUTOCASTS),
            show_default=False,
            help="Run the candidate (default: the model as it is) as neuronx-cc documents --auto-cast, emulated.",
        ),
    ] = None,
    cast_type: Annotated[
        str, typer.Option("--cast-type", metavar="|".join(CAST_TYPES), help="What the auto-cast casts to.")
    ] = "bf16",
    tokens: Annotated[int, typer.Option("--tokens", metavar="N", min=0, help="Also match N generated tokens.")] = 0,
    localise: Annotated[
        bool | None,
        typer.Option("--localise/--no-localise", show_default=False, help="Look for the op at fault. Default: when something differs."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", show_default=False, help="Also write a page to look at.")
    ] = None,
    format: ReportFormat = "text",
    pipeline: PipelineText = None,
    target: TargetName = "trn2",
    sdk: Sdk = None,
    ranges: Ranges = None,
    output: Output = None,
    traceback: Traceback = False,
) -> None:
    """Compare with the model, three-way: against a high-precision run and the model's own noise floor; name the line at fault.

    Exits 0 when the candidate computes what the model computes, 1 when it does not.

    [bold]Examples[/]

    \b
    nxfx verify model.py:tiny                         the prepared model against the model
    nxfx verify model.py:tiny --autocast all          what --auto-cast=all would do to it
    nxfx verify model.py:tiny --candidate outputs.npz --captures dump/
                                                      what a device gave, and where it went wrong
    nxfx verify model.py:llama --tokens 16 --html report.html
    """
    with console.reported("verify", traceback):
        console.choose("format", format, REPORT_FORMATS)
        console.choose("reference", reference, REFERENCES)
        console.choose("auto-cast", autocast or "none", AUTOCASTS)
        console.choose("cast type", cast_type, CAST_TYPES)
        from nxfx.cli import verify

        console.check_writable(output)
        console.check_writable(html)
        report = verify.run(
            spec,
            candidate,
            Preparation(pipeline, target, sdk, console.ranges(ranges or ())),
            reference=reference,
            autocast=autocast,
            cast_type=cast_type,
            localise=localise,
            captures=captures,
            tokens=tokens,
        )
        if html is not None:
            console.emit(report.to_html(), html)
        console.emit(report.to_json() if format == "json" else str(report), output)
        if not report.ok:
            raise typer.Exit(console.FAILED)


@app.command(epilog=EXIT_CODES)
def passes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", show_default=False, help="Explain this pass.")] = None,
    traceback: Traceback = False,
) -> None:
    """List the passes in the order they run; with NAME, what that pass is given, what results, and its options.

    [bold]Examples[/]

    \b
    nxfx passes
    nxfx passes narrow-64bit
    """
    with console.reported("passes", traceback):
        from nxfx.cli import passes

        console.emit(passes.explain(name) if name is not None else passes.listing())


@app.command(epilog=EXIT_CODES)
def doctor(
    format: ReportFormat = "text",
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="NAME", show_default=False, help="Also say what holds for inf2, trn1, trn2 or trn3."),
    ] = None,
    sdk: Sdk = None,
    traceback: Traceback = False,
) -> None:
    """Say what is installed here, what nxfx can hand a cleaned graph to, and what to install for the rest.

    [bold]Examples[/]

    \b
    nxfx doctor
    nxfx doctor --target trn1 --sdk 2.31          and what that generation does under that release, with sources
    """
    with console.reported("doctor", traceback):
        console.choose("format", format, REPORT_FORMATS)
        if sdk is not None and target is None:
            raise UsageError("--sdk goes with --target")
        from nxfx.cli import doctor
        from nxfx.targets import get_target

        diagnosis = doctor.diagnose(get_target(target, sdk) if target is not None else None)
        console.emit(diagnosis.to_json() if format == "json" else str(diagnosis))


def main() -> None:
    """The console script."""
    app()
