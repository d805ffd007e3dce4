"""The command line. Heavy libraries are imported by the command that needs them."""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from crnn.errors import UserError
from flows.children import KEPT

if TYPE_CHECKING:
    from flows.experiment import Experiment
    from flows.rows import Row

app = typer.Typer(
    help="Make a CRNN text recogniser small by network slimming, as a cached pipeline.",
    epilog="--debug, with any command, adds the traceback to an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

INTERRUPTED, TERMINATED = 130, 143

FULL = 1_000_000
"""Bytes: with fewer left, a disk is why a server of ours fails."""

ParamsFile = Annotated[
    Path, typer.Argument(help="Experiment file, such as params/quickstart.yaml.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value, in place of the file's.")
]
Ratios = Annotated[str | None, typer.Option(help="Prune ratios, such as 0.62,0.75.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command()
def frontier(
    params: ParamsFile, ratios: Ratios = None, set: Overrides = None, as_json: AsJson = False
) -> None:
    """Run the pipeline over the prune ratios. What is cached is not computed again."""
    experiment = _experiment(params, set, ratios)
    from flows import display
    from flows import frontier as run

    with display.live():
        state: Any = run(experiment, return_state=True)
    if state.is_cancelled():
        from flows.pipeline import INTERRUPTED as BY_CTRL_C

        if state.name == BY_CTRL_C:
            sys.exit(INTERRUPTED)  # main() says the rest, as it does for every command.
        _fail(f"{state.name.lower()}; {state.message}", TERMINATED)
    result = state.result()
    if as_json:
        _print_json(
            {
                "rows": result.rows,
                "computed": result.computed,
                "sweep_run": result.sweep_run,
                "charts": result.charts,
                "report": str(result.report),
                "champion": result.champion,
            }
        )
        return
    _print_frontier(experiment.name, result.rows)
    print(result.champion)
    count = len(result.computed)
    counted = f"{count} stage{'s' * (count > 1)} computed" if count else "everything was cached"
    print(f"{counted}; tables, plots and the checkpoint of each point: {_short(result.report)}")
    print(f"compare the runs with: {_short(Path(sys.argv[0]))} ui")
    if result.charts:
        print(f"then their charts are on: {result.charts}")


@app.command("check-data")
def check_data(params: ParamsFile, set: Overrides = None, as_json: AsJson = False) -> None:
    """Look at every sample as training would, and list what cannot be used."""
    experiment = _experiment(params, set)
    from flows import display
    from flows.preview import check

    with display.live():
        counts, bad = check(experiment)
    if as_json:
        _print_json({"counts": counts, "bad": bad})
    else:
        for split, numbers in counts.items():
            print(
                f"{split}: {numbers['total']} samples, {numbers['usable']} usable,"
                f" {numbers['squeezed']} wider than data.max_width and squeezed; the widest has"
                f" {numbers['widest_px']} px at 32 px high"
            )
        for sample in bad:
            print(f"  {sample['split']} {sample['name']}: {sample['reason']} ({sample['detail']})")
    is_empty = any(numbers["usable"] == 0 for numbers in counts.values())
    # Bad ones a run leaves out where it is told to, as long as others are there.
    if is_empty or (bad and experiment.data.on_bad_sample == "refuse"):
        raise typer.Exit(2)


@app.command()
def preview(
    params: ParamsFile, ratios: Ratios = None, set: Overrides = None, as_json: AsJson = False
) -> None:
    """Show what each ratio would keep, from the cached sparse checkpoint, without training."""
    experiment = _experiment(params, set, ratios)
    from flows.preview import preview as look
    from flows.report import asked_and_got

    seen = look(experiment)
    if as_json:
        _print_json(seen)
        return
    cuts, verdict = seen["cuts"], seen["readiness"]
    print(verdict["sentence"])
    if seen["free_ratio"] < verdict["free_ratio"]:
        print(f"with the settings of prune no live channel goes up to {seen['free_ratio']:g}")
    header = ["point", "cut", "asked / got", "live channels cut", "params", "MACs", "size"]
    _print_table(
        f"{experiment.name}: cuts of the sparse network",
        header,
        [
            [
                c["point"],
                f"{100 * c['ratio_achieved']:.1f}%",
                asked_and_got(c),
                str(c["live_removed"]),
                f"{c['params'] / 1e6:.3f} M",
                f"{c['macs'] / 1e6:.1f} M",
                f"{c['bytes'] / 1e6:.2f} MB",
            ]
            for c in cuts
        ],
    )
    _print_table(
        "channels kept by layer",
        ["layer", "of", *(c["point"] for c in cuts)],
        [
            [name, str(channels), *(_bar(c["widths"][layer], channels) for c in cuts)]
            for layer, (name, channels) in enumerate(verdict["channels"].items())
        ],
    )


def _bar(count: int, of: int) -> str:
    """A count and its share as a bar of four characters."""
    eighths = round(32 * count / of)
    full, rest = divmod(eighths, 8)
    return f"{'█' * full}{' ▏▎▍▌▋▊▉'[rest].strip():<{4 - full}} {count:>3}"


@app.command()
def runs(as_json: AsJson = False) -> None:
    """List finished sweeps, and stages that are under way or were stopped."""
    from flows.listing import stages_under_way, sweeps

    finished, under_way = sweeps(), list(stages_under_way())
    if as_json:
        _print_json({"sweeps": finished, "under_way": under_way})
        return
    _print_table(
        "finished sweeps",
        ["experiment", "sweep", "finished", "points", "baseline", "lowest", "smallest"],
        [
            [
                sweep["experiment"],
                sweep["sweep"],
                sweep["finished"],
                str(len(sweep["points"])),
                *(f"{100 * share:.1f}%" for share in _first_and_lowest(sweep["points"])),
                f"{sweep['smallest'] / 1e6:.2f} MB",
            ]
            for sweep in finished
        ],
    )
    _print_table(
        "stages under way",
        ["stage", "state", "epochs", "since", "key"],
        [
            [s["stage"], s["state"], f"{s['epochs']}/{s['of'] or '-'}", s["since"], s["key"]]
            for s in under_way
        ],
    )


def _first_and_lowest(points: dict[str, float]) -> tuple[float, float]:
    accuracies = list(points.values())
    return accuracies[0], min(accuracies)


@app.command()
def show(
    sweep: Annotated[str, typer.Argument(help="Experiment, EXPERIMENT/SWEEP, or sweep.")],
    as_json: AsJson = False,
) -> None:
    """Show the table of a finished sweep; for an experiment, of its newest."""
    from flows.listing import folder_of, rows_of

    folder = folder_of(sweep)
    rows = rows_of(folder)
    if as_json:
        _print_json({"rows": rows, "report": str(folder)})
        return
    _print_frontier(folder.parent.name, rows)
    print(f"tables, plots and the files of each point: {_short(folder)}")


@app.command()
def compare(
    sweeps: Annotated[
        list[str], typer.Argument(help="Params files, experiments, or EXPERIMENT/SWEEP.")
    ],
    different_data: Annotated[
        bool, typer.Option("--different-data", help="Also where the samples are not the same.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Put finished frontiers side by side, in one table and plot."""
    from flows.compare import compare as put_together

    rows, folder = put_together(sweeps, different_data)
    if as_json:
        _print_json({"rows": rows, "report": str(folder)})
        return
    _print_frontier(", ".join(dict.fromkeys(r["frontier"] for r in rows)), rows)
    print(f"tables and plots: {_short(folder)}")


@app.command()
def predict(
    model: Annotated[
        str, typer.Argument(help="ONNX file, checkpoint, or MLflow URI (models:/...).")
    ],
    images: Annotated[list[Path], typer.Argument(help="Image files and folders of images.")],
    beam: Annotated[
        int, typer.Option(min=0, max=1000, help="Texts that beam search follows; 0: greedy.")
    ] = 0,
    lexicon: Annotated[
        Path | None, typer.Option(help="Read only texts of this file, one a line.")
    ] = None,
    language: Annotated[
        Path | None, typer.Option(help="Example texts: prefer what looks like them.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read text from images: one line each with path, text and confidence."""
    from flows.predict import Decoding
    from flows.predict import predict as read

    readings, failures = read(model, images, Decoding(beam, lexicon, language))
    if as_json:
        _print_json({"readings": readings, "failures": failures})
    else:
        for reading in readings:
            print(f"{reading['image']}\t{reading['text']}\t{reading['confidence']:.4f}")
    for failure in failures:
        print(f"not read: {failure['image']}: {failure['reason']}", file=sys.stderr)
    if failures:
        raise typer.Exit(2)


@app.command("convert-sroie")
def convert_sroie(
    folder: Annotated[Path, typer.Argument(help="Published SROIE folder with img/ and box/.")],
    target: Annotated[Path, typer.Argument(help="Folder for the line crops and label files.")],
) -> None:
    """Cut receipts of ICDAR 2019 SROIE into lines, with label files that params files can name."""
    from crnn.data.sroie import convert

    for what, count in convert(folder, target).items():
        print(f"{what}: {count}")


@app.command("convert-checkpoint")
def convert_checkpoint(
    state: Annotated[Path, typer.Argument(help="State dict of a VGG13 CRNN (.pth, .safetensors).")],
    target: Annotated[Path, typer.Argument(help="Checkpoint to write, for baseline.checkpoint.")],
    charset: Annotated[Path, typer.Option(help="Its characters, in one line or one a line.")],
    max_width: Annotated[int, typer.Option(min=32, max=2048, help="Widest line, px.")] = 320,
) -> None:
    """Make a checkpoint of a network that was trained elsewhere."""
    from crnn.charset import Charset
    from crnn.checkpoint import save_checkpoint
    from crnn.conversion import convert

    if target.is_dir():
        raise UserError(f"{target} is a folder; name the checkpoint to write in it")
    converted = convert(state, Charset.load(charset), max_width)
    save_checkpoint(target, converted)
    count = sum(parameter.numel() for parameter in converted.model.parameters())
    print(f"{target}: {count / 1e6:.3f} M parameters, {converted.model.classes} classes")


@app.command()
def gc(
    older_than: Annotated[
        float, typer.Option(min=0, help="Days that a folder was left alone.")
    ] = 7,
    yes: Annotated[bool, typer.Option("--yes", help="Remove; without it nothing is.")] = False,
) -> None:
    """Show, and with --yes remove, what no sweep or registered model refers to any more."""
    from flows import project

    project.configure_environment()
    from flows.garbage import garbage, remove
    from flows.tracking import deleted_and_registered

    found = garbage(older_than, *deleted_and_registered())
    for item in found:
        print(f"{item.size / 1e6:9.2f} MB  {_short(item.path)}: {item.reason}")
    total = sum(item.size for item in found) / 1e6
    if yes:
        gone = remove(found, older_than)
        total = sum(item.size for item in gone) / 1e6
        print(f"{len(gone)} folders, {total:.2f} MB, removed")
    else:
        print(f"{len(found)} folders, {total:.2f} MB; nothing was removed, --yes removes them")


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Serve MLflow's UI on the project's runs, on this machine alone."""
    from flows import project

    project.configure_environment()
    store = os.environ["MLFLOW_TRACKING_URI"]
    if store.startswith("http"):
        print(f"MLFLOW_TRACKING_URI is set: the runs are on {store}")
        return
    from flows.servers import mlflow_command, port_is_free
    from flows.tracking import create_store

    if not port_is_free(port):
        raise UserError(f"port {port} is taken; choose another with --port")
    create_store()
    print(f"MLflow on http://127.0.0.1:{port} (stop with Ctrl-C)", flush=True)
    os.execv(sys.executable, mlflow_command(port))


@app.command()
def up(
    mlflow_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of MLflow on 127.0.0.1.")
    ] = 5000,
    prefect_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of Prefect on 127.0.0.1.")
    ] = 4200,
) -> None:
    """Serve MLflow's and Prefect's pages on the project's stores, until Ctrl-C."""
    from flows import project

    project.configure_environment()
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        if os.environ.get(name, "").startswith("http"):
            raise UserError(f"{name} is set to {os.environ[name]}: a server is there already")
    from flows.servers import serving

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with serving(mlflow_port, prefect_port) as servers:
        print(f"MLflow   {servers.mlflow}   the runs: compare points, look at gammas")
        print(f"Prefect  {servers.prefect}   the pipelines: states, schedules, logs")
        print("Pipelines of this folder that start from now on are shown there, such as")
        print("    crnn-slim frontier params/quickstart.yaml")
        print("Ctrl-C stops both.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    print("both servers have stopped")


@app.command()
def schedule(
    params: ParamsFile,
    cron: Annotated[list[str], typer.Option(help="When, such as '0 2 * * *'; may be repeated.")],
    timezone: Annotated[str, typer.Option(help="Of the cron, such as Europe/Berlin.")] = "UTC",
    overlap: Annotated[
        Literal["skip", "queue", "allow"],
        typer.Option(help="What becomes of a run that is due while the last one is under way."),
    ] = "skip",
    set: Overrides = None,
) -> None:
    """Run the pipeline whenever its time comes, until Ctrl-C; Prefect's pages show and edit it."""
    experiment = _experiment(params, set)
    from flows import definitions, project, servers

    definitions.open_sources(experiment)
    project.configure_environment()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with servers.prefect() as api:
        os.environ["PREFECT_API_URL"] = api
        from flows.schedule import schedules, serve

        times = schedules(cron, timezone)
        page = api.removesuffix("/api")
        print(f"{experiment.name} runs at {', '.join(cron)} ({timezone}), on {page}")
        print(
            "its settings can be changed there, and a run be started; Ctrl-C ends this", flush=True
        )
        with contextlib.suppress(KeyboardInterrupt):
            serve(experiment, times, overlap)
    print(f"{experiment.name} is no longer scheduled")


@app.command()
def join(params: ParamsFile, set: Overrides = None) -> None:
    """Train along with the machine at execution.rendezvous, stage after stage, until Ctrl-C."""
    experiment = _experiment(params, set)
    from flows import display
    from flows.joining import join as train_along

    with display.live():
        train_along(experiment)


def _experiment(
    params: Path, overrides: list[str] | None, ratios: str | None = None
) -> "Experiment":
    from flows.experiment import load_experiment

    return load_experiment(params, overrides or [], _numbers(ratios))


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise UserError(
            f"--ratios takes numbers with commas, such as 0.62,0.75; not {text!r}"
        ) from error


def _short(path: Path) -> Path:
    """The path from here, where it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=1))


def _print_frontier(title: str, rows: "list[Row]") -> None:
    from flows import report
    from flows.comparison import remarks

    _print_table(report.subject(title, rows), *report.table_cells(rows))
    for sentence in remarks(rows):
        print(sentence)


def _print_table(title: str, header: list[str], cells: list[list[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    for name in header:
        # In a narrow terminal the widest columns alone are broken into lines.
        justify: Literal["left", "right"] = "left" if name == "point" else "right"
        table.add_column(name, justify=justify, no_wrap=" " not in name)
    for line in cells:
        table.add_row(*line)
    console = Console()
    # Into a file or a pipe the whole table goes, not what 80 columns hold of it.
    console.print(table) if console.is_terminal else Console(width=10_000).print(table)


def main() -> None:
    """Entry point: a user's mistake is one sentence and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # A name need not be UTF-8.
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        app(arguments)
    except SystemExit as done:
        if done.code == INTERRUPTED:
            _fail(f"interrupted; {KEPT}", INTERRUPTED)
        raise
    except BaseException as error:
        if debug:
            traceback.print_exc()
        _explain(error)


def _explain(error: BaseException) -> None:
    """End with one sentence and the exit code of its kind."""
    if isinstance(error, UserError):
        _fail(str(error), 2)
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        trains = any(command in sys.argv for command in ("frontier", "schedule", "join"))
        _fail(f"{error.strerror or error}{where}{f'; {KEPT}' if trains else ''}", 2)
    if _is_of_prefect_s_client(error):  # MLflow's does not raise.
        _fail(f"{_why_prefect_fails(error)}; {KEPT}", 2)
    if isinstance(error, Exception):
        _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1)
    _fail(f"terminated; {KEPT}", TERMINATED)


def _is_of_prefect_s_client(error: BaseException) -> bool:
    """Whether a request to Prefect's server failed, which Prefect may wrap in another error."""
    cause: BaseException | None = error
    while cause and not any(kind.__module__.startswith("httpx") for kind in type(cause).__mro__):
        cause = cause.__cause__
    return cause is not None


def _why_prefect_fails(error: BaseException) -> str:
    from flows import project

    home = project.home()
    if home.exists() and shutil.disk_usage(home).free < FULL:
        return f"No space left on device ({home}): Prefect's server cannot write"
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return f"Prefect's server at {os.environ['PREFECT_API_URL']} fails ({reason})"


def _fail(message: str, code: int) -> None:
    print(f"crnn-slim: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
