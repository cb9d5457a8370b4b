"""The command `trainer`: parse, call, print. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import yaml
from rich.progress import track
from rich.table import Table

from trainer import edit_commands
from trainer.config import (
    DecoderConfig,
    checked,
    known_fields,
    to_mapping,
    with_settings,
)
from trainer.errors import TrainerError, UsageError
from trainer.options import (
    AsJson,
    DecoderFolder,
    Ema,
    EndingName,
    GuidanceScale,
    PixelStageRun,
    Quiet,
    Run,
    Steps,
    Weak,
    WeakScale,
    parse_ending,
    parse_seeds,
)
from trainer.presets import decoder_preset
from trainer.printing import flattened, print_result, stderr, stdout, write_json
from trainer.run_kinds import ALL_PRESETS, METHODS, AnyConfig, config_of, method_of, preset_of

app = typer.Typer(
    name="trainer",
    help="Train, sample and measure hierarchy-conditioned one-step flow models.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
)


@app.command()
def train(
    shards: Annotated[str, typer.Argument(help="Finished shard folder, its build folder, or an fsspec URL.")],
    out: Annotated[Path, typer.Option(help="Run folder; the same command resumes there.")],
    preset_name: Annotated[
        str | None,
        typer.Option("--preset", help="See `trainer presets`. Default: what RUN holds, else the method's."),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help=f"{', '.join(METHODS)}. Default: that of the preset, or else of RUN.")
    ] = None,
    pixel_stage: Annotated[
        bool, typer.Option("--pixel-stage", help="Latent Forcing: all levels, then pixels, in one network.")
    ] = False,
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
    from trainer import dispatch
    from trainer.shards import open_index

    base = _base(preset_name, method, out)
    if pixel_stage and method_of(base) != "latent-forcing":
        raise UsageError("--pixel-stage trains a network of Latent Forcing: add --method latent-forcing")
    flags = {"total_images": total_images, "batch_size": batch_size, "seed": seed, "max_seconds": max_seconds}
    given = {name: value for name, value in flags.items() if value is not None}
    in_file = flattened(_load_yaml(config)) if config else {}
    given |= {"pixel_stage": True} if pixel_stage else {}
    asked = {**in_file, **_assignments(settings or []), **given}
    resolved = dispatch.fit_to_shards(with_settings(base, asked), open_index(shards), asked)
    if dry_run:
        print_result(to_mapping(resolved), as_json)
        return
    _run_and_print(
        lambda: dispatch.train(resolved, shards, str(out), resume, quiet), resolved, as_json, quiet
    )


@app.command("train-decoder")
def train_decoder(
    shards: Annotated[str, typer.Argument(help="Shards built with --images, or their build folder or URL.")],
    out: Annotated[
        Path, typer.Option(help="Folder of run and decoder; RUN/decoder is found by `sample` and `report`.")
    ],
    size: Annotated[
        str | None, typer.Option(help="tiny, B, L or XL. Default: what the folder holds, else XL.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(envvar="TRAINER_CONFIG", help="YAML of fields, over those of the size.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="One field by name, for example noise=0.4.")
    ] = None,
    lpips: Annotated[
        Path | None, typer.Option(help="Folder with the weights of a perceptual loss: vgg16 and lpips.")
    ] = None,
    gan: Annotated[
        Path | None, typer.Option(help="Weights of DINO's ViT-S/8 for an adversarial loss.")
    ] = None,
    total_images: Annotated[int | None, typer.Option(help="Images seen until the run ends.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images in one optimiser step, over all ranks.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order and noise.")] = None,
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
    """Shards with pictures → a decoder from features to pixels, for --decoder."""
    from trainer import train_decoder as room

    flags = {
        "lpips_weights": lpips and str(lpips),
        "gan_weights": gan and str(gan),
        "total_images": total_images,
        "batch_size": batch_size,
        "seed": seed,
        "max_seconds": max_seconds,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    asked = {**(_load_yaml(config) if config else {}), **_assignments(settings or []), **given}
    resolved = with_settings(_decoder_base(size, out), asked)
    if dry_run:
        print_result(to_mapping(resolved), as_json)
        return
    _run_and_print(
        lambda: room.train_decoder(resolved, shards, str(out), resume, quiet), resolved, as_json, quiet
    )


@app.command()
def sample(
    run: Run,
    labels: Annotated[str, typer.Option(help="Class ids or names, separated by commas.")],
    out: Annotated[Path, typer.Option(help="Folder of the files.")],
    seeds: Annotated[str, typer.Option(help="Seeds such as 0-7 or 0,3,9; each for every label.")] = "0-3",
    formats: Annotated[
        str, typer.Option("--format", help="Any of png, html, safetensors, webdataset, npz.")
    ] = "png,html,safetensors",
    steps: Steps = 1,
    guidance: GuidanceScale = None,
    weak: Weak = None,
    weak_scale: WeakScale = None,
    ema: Ema = "auto",
    decoder: DecoderFolder = None,
    pixel_stage: PixelStageRun = None,
    ending: EndingName = None,
    as_json: AsJson = False,
) -> None:
    """Labels and seeds → trajectories, as sheets, pages, safetensors, tars or arrays."""
    from trainer.dispatch import load_pipeline
    from trainer.sample_files import parse_formats, write_samples

    numbers, names = parse_seeds(seeds), parse_formats(formats)
    chosen = parse_ending(ending)
    pipe = load_pipeline(run, ema, decoder, weak=weak, pixel_stage=pixel_stage, ending=chosen)
    ids = [pipe.label_id(label.strip()) for label in labels.split(",")]
    pairs = [(label, seed) for label in ids for seed in numbers]
    strength = _strength(weak, weak_scale)
    drawn = pipe.stream([label for label, _ in pairs], [seed for _, seed in pairs], steps, guidance, strength)
    facts = {"run": run.resolve().name, "weights": ema, "steps per level": steps, "samples": len(pairs)}
    facts |= {"guidance": guidance} if guidance else {}
    facts |= {"autoguidance": strength} if strength else {}
    written = write_samples(drawn, out, names, len(pairs), facts)
    rows = list(track(written, "sampling", len(pairs), console=stderr, disable=not stderr.is_terminal))
    stderr.print(f"wrote {', '.join(names)} to {out}", markup=False, highlight=False)
    print_result(rows, as_json)


for verb in (edit_commands.encode, edit_commands.edit, edit_commands.compare, edit_commands.sweep):
    app.command()(verb)


@app.command()
def evaluate(
    run: Run,
    shards: Annotated[str, typer.Option(help="Shards of real images to compare with.")],
    samples_per_class: Annotated[int, typer.Option(min=1, help="Samples of each class.")] = 8,
    max_real: Annotated[int, typer.Option(min=2, help="Real images read at most.")] = 10_000,
    steps: Steps = 1,
    guidance: GuidanceScale = None,
    weak: Weak = None,
    weak_scale: WeakScale = None,
    likelihood: Annotated[
        bool, typer.Option("--likelihood", help="Bits of the images, of Normalizing Trajectory Models.")
    ] = False,
    ending: EndingName = None,
    inception: Annotated[
        str | None, typer.Option(help="IS and FID by torch-fidelity: file of Inception weights, or hub.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="npz of mu and sigma of real images, for FID.")
    ] = None,
    edits: Annotated[
        bool, typer.Option("--edits", help="Also locality of edits, over seeds and up to 12 classes.")
    ] = False,
    alignment: Annotated[
        bool, typer.Option("--alignment", help="Also when boundaries of regions appear, likewise.")
    ] = False,
    ema: Ema = "auto",
    as_json: AsJson = False,
) -> None:
    """Metrics of samples, beside real images, noise and chance; kept in RUN for the report."""
    from trainer import studies
    from trainer.dispatch import load_pipeline
    from trainer.evaluate import evaluate as measure
    from trainer.metrics.frechet import inception_features, read_reference
    from trainer.report_inputs import EVALUATION, shown_labels
    from trainer.shards import open_index

    index = open_index(shards)
    pipe = load_pipeline(run, ema, weak=weak, ending=parse_ending(ending))
    if likelihood:
        print_result(_measured(run, pipe, index, max_real, steps, ema), as_json)
        return
    strength = _strength(weak, weak_scale)
    judge = None if inception is None else inception_features(None if inception == "hub" else inception)
    real = None if reference is None else read_reference(reference)
    metrics = list(measure(pipe, index, samples_per_class, steps, max_real, guidance, strength, judge, real))
    settings = (pipe, run, shown_labels(index.num_classes), range(samples_per_class))
    metrics += studies.edit_study(*settings, steps) if edits else []
    if alignment:
        photos = studies.photos_of(pipe, index, len(settings[2]) * samples_per_class)
        metrics += studies.alignment_study(*settings, photos=photos)
    rows = [{"name": name, "value": value} for name, value in metrics]
    setup = {
        "samples_per_class": samples_per_class,
        "num_steps": steps,
        "guidance": guidance,
        "weak_scale": strength,
        "ema": ema,
        "shards": index.name,
    }
    write_json(run / EVALUATION, {**setup, "metrics": rows})
    print_result(rows, as_json)


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
    edits: Annotated[
        list[Path] | None,
        typer.Option("--edit", help="Edited trajectory to show; may be given several times."),
    ] = None,
    sweep_file: Annotated[
        Path | None, typer.Option("--sweep", help="What `trainer sweep --out` wrote.")
    ] = None,
    guidance: GuidanceScale = None,
    weak: Weak = None,
    weak_scale: WeakScale = None,
    ema: Ema = "auto",
    decoder: DecoderFolder = None,
    pixel_stage: PixelStageRun = None,
) -> None:
    """Run folder → one HTML page of samples, curves, scores and configuration."""
    from hierarchy_builder.canvases.gallery import write_page
    from trainer.dispatch import load_pipeline
    from trainer.edit_report import edits_section, read_sweep, sweep_section
    from trainer.evaluate import check_fits
    from trainer.report_inputs import run_page, shown_labels
    from trainer.shards import open_index
    from trainer.trajectory import Trajectory

    numbers = parse_seeds(seeds)
    pipe = load_pipeline(run, ema, decoder, weak=weak, pixel_stage=pixel_stage)
    index = open_index(shards) if shards else None
    if index is not None:
        check_fits(pipe, index)
    pairs = [(label, seed) for label in shown_labels(pipe.model.config.num_classes) for seed in numbers]
    labels, chosen = [label for label, _ in pairs], [seed for _, seed in pairs]
    trajectories = pipe(labels, chosen, 1, guidance, _strength(weak, weak_scale))
    rows = _load_rows(stages) if stages else []
    more = [sweep_section(read_sweep(sweep_file))] if sweep_file else []
    if edits:
        more.insert(0, edits_section([pipe.adopt(Trajectory.load(path)) for path in edits]))
    page = run_page(run, pipe, trajectories, index, rows, more)
    target = out or run / "report.html"
    write_page(page, target)
    print(target)


@app.command()
def studio(
    run: Run,
    folder: Annotated[
        Path | None, typer.Option(help="Where trajectories and reports are kept. Default: RUN/studio.")
    ] = None,
    vocabulary: Annotated[
        Path | None, typer.Option(help="vocabulary.npz, whose prototypes then are sources of edits.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to serve on; others can reach it if it is not this one.")
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port; by default the first free one from 7860.")] = None,
    ema: Ema = "auto",
    decoder: DecoderFolder = None,
) -> None:
    """Look at trajectories in a browser, edit, resume, compare and save them (the extra `studio`)."""
    try:
        from trainer.studio import launch
    except ModuleNotFoundError as error:
        raise TrainerError(
            f"{error.name} is not installed: install the extra, pip install 'trajectory-hierarchies[studio]'"
        ) from None
    from trainer.dispatch import load_pipeline

    if vocabulary is not None and not vocabulary.is_file():
        raise UsageError(
            f"no vocabulary at {vocabulary}: `hierarchy-builder cluster --vocabulary` writes one"
        )
    pipe = load_pipeline(run, ema, decoder)
    launch(pipe, folder or run / "studio", vocabulary, host=host, port=port)


@app.command()
def import_official(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", exists=True, dir_okay=False, help="Checkpoint file of the authors' release."
        ),
    ],
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

    print_result(convert(file, out, config, ema, encoder), as_json)


@app.command()
def export_official(
    run: Run,
    out: Annotated[Path, typer.Option(help="Folder of checkpoint_<step> and config.json.")],
    as_json: AsJson = False,
) -> None:
    """Run folder → checkpoint of the release; what was imported comes out equal."""
    from trainer.exchange import export_official as convert

    print_result(convert(run, out), as_json)


@app.command()
def presets(as_json: AsJson = False) -> None:
    """Named configurations; with --json every field of each."""
    if as_json:
        print_result({name: to_mapping(make()) for name, make in ALL_PRESETS.items()}, as_json)
        return
    table = Table("preset", "width", "depth", "batch", "images", "about")
    for name, make in ALL_PRESETS.items():
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


def _measured(run: Path, pipe: Any, index: Any, max_real: int, steps: int, ema: str) -> list[dict[str, Any]]:
    """Rows of `evaluate --likelihood`, kept in RUN with the bits of every image."""
    from trainer.evaluate import check_fits
    from trainer.likelihood import likelihood
    from trainer.likelihood_page import write_likelihood

    check_fits(pipe, index)
    metrics, images = likelihood(pipe, index, max_real, steps)
    rows = [{"name": name, "value": value} for name, value in metrics]
    setup = {"shards": index.name, "shards_hash": index.config_hash, "num_steps": steps, "ema": ema}
    write_likelihood(run, setup, rows, images)
    return rows


def _strength(weak: Path | None, weak_scale: float | None) -> float:
    """Strength of autoguidance, by its two options."""
    return weak_scale if weak_scale is not None else float(weak is not None)


def _base(preset_name: str | None, method: str | None, out: Path) -> AnyConfig:
    """The configuration before file and flags: the preset, or else what the run folder holds."""
    stored = out / "config.yaml"
    if preset_name is None and method is None and stored.exists():
        return config_of(_load_yaml(stored).get("config", {}), str(stored))
    return preset_of(preset_name, method)


def _decoder_base(size: str | None, out: Path) -> DecoderConfig:
    """The configuration before file and flags: that of the size, or else what the folder holds."""
    stored = out / "config.yaml"
    if size is None and stored.exists():
        return checked(DecoderConfig, _load_yaml(stored).get("config", {}), str(stored))
    return decoder_preset(size or "XL")


def _run_and_print(run: Callable[[], Any], config: Any, as_json: bool, quiet: bool) -> None:
    """Train with the resolved configuration on stderr and the summary on stdout, both by the main rank."""
    is_main = os.environ.get("RANK", "0") == "0"
    if not quiet and is_main:
        text = yaml.safe_dump(to_mapping(config), sort_keys=False).rstrip()
        stderr.print(text, markup=False, highlight=False, style="dim")
    try:
        summary = run()
    except KeyboardInterrupt:
        stderr.print("stopped; the same command goes on from the last checkpoint")
        raise typer.Exit(130) from None
    if is_main:
        print_result(dataclasses.asdict(summary), as_json)


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


if __name__ == "__main__":
    main()
