"""The command `trainer`: parse, call, print. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import yaml
from rich.console import Console
from rich.table import Table

from trainer.config import TrainConfig, from_mapping, known_fields, to_mapping, with_settings
from trainer.errors import TrainerError, UsageError
from trainer.presets import PRESETS, preset

app = typer.Typer(
    name="trainer",
    help="Train, sample and measure hierarchy-conditioned one-step flow models.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
)
stdout, stderr = Console(), Console(stderr=True)

Run = Annotated[Path, typer.Argument(help="Run folder of `trainer train`, or one of its checkpoints.")]
Ema = Annotated[
    str, typer.Option(help="Half-life in kimg of the weight average; auto: the first; raw: none.")
]
DecoderFolder = Annotated[Path | None, typer.Option("--decoder", help="Folder of an RAE decoder.")]
Steps = Annotated[int, typer.Option(min=1, help="Network evaluations per level.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no configuration on stderr.")]


@app.command()
def train(
    shards: Annotated[str, typer.Argument(help="Finished shard folder, its build folder, or an fsspec URL.")],
    out: Annotated[Path, typer.Option(help="Run folder; the same command resumes there.")],
    preset_name: Annotated[
        str | None,
        typer.Option("--preset", help="See `trainer presets`. Default: what RUN holds, else TF-B."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(envvar="TRAINER_CONFIG", help="YAML of fields, over the preset.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="One field by dotted name, for example optim.lr=0.005.")
    ] = None,
    total_images: Annotated[int | None, typer.Option(help="Images seen until the run ends.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images in one optimiser step, over all ranks.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order, levels, times and noise.")] = None,
    max_seconds: Annotated[
        float | None, typer.Option(help="Wall clock after which a checkpoint is written; exit code 75.")
    ] = None,
    resume: Annotated[str, typer.Option(help="auto, never, or a run or checkpoint folder.")] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration only.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Shards → checkpoints. Under torchrun every process is a rank."""
    from trainer import train as room
    from trainer.shards import open_index

    flags = {"total_images": total_images, "batch_size": batch_size, "seed": seed, "max_seconds": max_seconds}
    given = {name: value for name, value in flags.items() if value is not None}
    in_file = _flattened(_load_yaml(config)) if config else {}
    asked = {**in_file, **_assignments(settings or []), **given}
    resolved = room.fit_to_shards(with_settings(_base(preset_name, out), asked), open_index(shards), asked)
    if dry_run:
        _print(to_mapping(resolved), as_json)
        return
    is_main = os.environ.get("RANK", "0") == "0"
    if not quiet and is_main:
        text = yaml.safe_dump(to_mapping(resolved), sort_keys=False).rstrip()
        stderr.print(text, markup=False, highlight=False, style="dim")
    try:
        summary = room.train(resolved, shards, str(out), resume, quiet)
    except KeyboardInterrupt:
        stderr.print("stopped; the same command goes on from the last checkpoint")
        raise typer.Exit(130) from None
    if is_main:
        _print(dataclasses.asdict(summary), as_json)


@app.command()
def sample(
    run: Run,
    labels: Annotated[str, typer.Option(help="Class ids or names, separated by commas.")],
    out: Annotated[Path, typer.Option(help="Folder of grid.png, index.html and trajectories.")],
    seeds: Annotated[str, typer.Option(help="Seeds such as 0-7 or 0,3,9; each for every label.")] = "0-3",
    steps: Steps = 1,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale, for models trained with it.")
    ] = None,
    ema: Ema = "auto",
    decoder: DecoderFolder = None,
    as_json: AsJson = False,
) -> None:
    """Labels and seeds → trajectories, as safetensors, one contact sheet and one page."""
    from hierarchy_builder.canvases.gallery import write_page
    from trainer.pipeline import TrajectoryPipeline
    from trainer.report import training_page, trajectory_grid_png
    from trainer.report_inputs import trajectory_views

    numbers = parse_seeds(seeds)
    pipe = TrajectoryPipeline.from_pretrained(run, ema, decoder)
    ids = [pipe.label_id(label.strip()) for label in labels.split(",")]
    pairs = [(label, seed) for label in ids for seed in numbers]
    trajectories = pipe([label for label, _ in pairs], [seed for _, seed in pairs], steps, guidance)
    (out / "trajectories").mkdir(parents=True, exist_ok=True)
    rows = []
    for trajectory, (label, seed) in zip(trajectories, pairs, strict=True):
        path = out / "trajectories" / f"label{label:04d}-seed{seed:06d}.safetensors"
        trajectory.save(path)
        rows.append({"label": label, "class": trajectory.class_name, "seed": seed, "file": str(path)})
    views = trajectory_views(trajectories)
    trajectory_grid_png(views).save(out / "grid.png")
    facts = {"run": run.resolve().name, "weights": ema, "steps per level": steps, "samples": len(views)}
    write_page(
        training_page(title="Generated trajectories", facts=facts, trajectories=views), out / "index.html"
    )
    stderr.print(f"wrote {out / 'grid.png'} and {out / 'index.html'}", markup=False, highlight=False)
    _print(rows, as_json)


@app.command()
def evaluate(
    run: Run,
    shards: Annotated[str, typer.Option(help="Shards of real images to compare with.")],
    samples_per_class: Annotated[int, typer.Option(min=1, help="Samples of each class.")] = 8,
    max_real: Annotated[int, typer.Option(min=2, help="Real images read at most.")] = 10_000,
    steps: Steps = 1,
    ema: Ema = "auto",
    as_json: AsJson = False,
) -> None:
    """Metrics of samples, beside real images, noise and chance; kept in RUN for the report."""
    from trainer.evaluate import evaluate as measure
    from trainer.pipeline import TrajectoryPipeline
    from trainer.report_inputs import EVALUATION
    from trainer.shards import open_index

    index = open_index(shards)
    pipe = TrajectoryPipeline.from_pretrained(run, ema)
    metrics = measure(pipe, index, samples_per_class, steps, max_real)
    rows = [{"name": name, "value": value} for name, value in metrics]
    setup = {"samples_per_class": samples_per_class, "num_steps": steps, "ema": ema, "shards": index.name}
    (run / EVALUATION).write_text(json.dumps({**setup, "metrics": rows}, indent=1))
    _print(rows, as_json)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder of `trainer train`.")],
    out: Annotated[Path | None, typer.Option(help="HTML file to write. Default: RUN/report.html.")] = None,
    shards: Annotated[
        str | None, typer.Option(help="Shards whose teachers are shown beside samples.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of each class shown.")] = "0",
    stages: Annotated[
        Path | None,
        typer.Option(help="JSON rows of a table to show, as `hierarchy-builder build --json` prints."),
    ] = None,
    ema: Ema = "auto",
    decoder: DecoderFolder = None,
) -> None:
    """Run folder → one HTML page of samples, curves, scores and configuration."""
    from hierarchy_builder.canvases.gallery import write_page
    from trainer.evaluate import check_fits
    from trainer.pipeline import TrajectoryPipeline
    from trainer.report_inputs import run_page, shown_labels
    from trainer.shards import open_index

    numbers = parse_seeds(seeds)
    pipe = TrajectoryPipeline.from_pretrained(run, ema, decoder)
    index = open_index(shards) if shards else None
    if index is not None:
        check_fits(pipe, index)
    pairs = [(label, seed) for label in shown_labels(pipe.model.config.num_classes) for seed in numbers]
    trajectories = pipe([label for label, _ in pairs], [seed for _, seed in pairs])
    rows = _load_rows(stages) if stages else []
    page = run_page(run, pipe, trajectories, index, rows)
    target = out or run / "report.html"
    write_page(page, target)
    print(target)


@app.command()
def import_official(
    file: Annotated[Path, typer.Argument(help="Checkpoint file of the authors' release.")],
    out: Annotated[Path, typer.Option(help="Run folder to write; sample from it, or train on in it.")],
    ema: Annotated[str | None, typer.Option(help="Half-life in kimg of the average to sample from.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Its config.json. Default: beside FILE or in the folder above.")
    ] = None,
    encoder: Annotated[
        str, typer.Option(help="Encoder whose features it was trained on.")
    ] = "dinov2-reg-base",
    as_json: AsJson = False,
) -> None:
    """Checkpoint of the release → run folder, with all averages and the optimiser."""
    from trainer.exchange import import_official as convert

    _print(convert(file, out, config, ema, encoder), as_json)


@app.command()
def export_official(
    run: Run,
    out: Annotated[Path, typer.Option(help="Folder of checkpoint_<step> and config.json.")],
    as_json: AsJson = False,
) -> None:
    """Run folder → checkpoint of the release; what was imported comes out equal."""
    from trainer.exchange import export_official as convert

    _print(convert(run, out), as_json)


@app.command()
def presets(as_json: AsJson = False) -> None:
    """Named configurations; with --json every field of each."""
    if as_json:
        _print({name: to_mapping(make()) for name, make in PRESETS.items()}, as_json)
        return
    table = Table("preset", "width", "depth", "batch", "images", "about")
    for name, make in PRESETS.items():
        config, about = make(), (inspect.getdoc(make) or "").splitlines()[0]
        shape = (config.model.width, config.model.depth, config.batch_size)
        table.add_row(name, *map(str, shape), f"{config.total_images:,}", about)
    stdout.print(table)


def main() -> NoReturn:
    """Run `trainer` and leave with the exit code of what happened; an error is printed as `error: …`."""
    try:
        app()
    except TrainerError as error:
        stderr.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except OSError as error:
        stderr.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    sys.exit(0)


def parse_seeds(text: str) -> list[int]:
    """Seeds of a list such as `0-7` or `0,3,9-11`. Raises UsageError."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError(f"seeds {text!r}, expected numbers and ranges such as 0-7 or 0,3,9")
        seeds += range(int(first), int(last or first) + 1)
    if not seeds:
        raise UsageError(f"seeds {text!r} name none, expected a rising range such as 0-7")
    return seeds


def _base(preset_name: str | None, out: Path) -> TrainConfig:
    """The configuration before file and flags: the preset, or else what the run folder holds."""
    stored = out / "config.yaml"
    if preset_name is None and stored.exists():
        return from_mapping(_load_yaml(stored).get("config", {}), str(stored))
    return preset(preset_name or "TF-B")


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"config file {path}: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UsageError(f"config file {path}: found {type(content).__name__}, expected fields by name")
    return content


def _load_rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--stages {path}: {error}") from None
    if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise UsageError(f"--stages {path}: expected a list of rows, column to value")
    return rows


def _flattened(mapping: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{inner}": v for inner, v in value.items()})
        else:
            flat[name] = value
    return flat


def _assignments(settings: Sequence[str]) -> dict[str, Any]:
    values = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting}: expected name=value, for example {known_fields()[0]}=TF-B")
        try:
            values[name.strip()] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UsageError(f"--set {setting}: {text!r} is no value of YAML") from None
    return values


def _print(content: Any, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    elif isinstance(content, list):
        table = Table(*content[0])
        for row in content:
            table.add_row(*(_text(value) for value in row.values()))
        stdout.print(table)
    else:
        table = Table("name", "value")
        for name, value in _flattened(content).items():
            table.add_row(name, _text(value))
        stdout.print(table)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
