"""The command `trainer`: parse, call, print. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from hierarchy_builder.errors import TrainerError, UsageError
from hierarchy_builder.files import write_json
from hierarchy_builder.progress import Follow, shown_on, unseen
from hierarchy_builder.terminal import print_result, stderr
from hierarchy_builder.terminal import run as run_command
from trainer.cli import editing as edit_commands
from trainer.cli import training as train_commands
from trainer.cli.options import (
    A_TRAJECTORY,
    PATH,
    AsJson,
    DecoderFolder,
    Ema,
    EndingName,
    GuidanceScale,
    PixelStageRun,
    Quiet,
    Run,
    ShiftedBy,
    Steps,
    VocabularyFile,
    Weak,
    WeakScale,
    parse_ending,
    reads,
    refuse_beside_likelihood,
)
from trainer.evaluation.tables import metric_tables
from trainer.seeds import parse_seeds

app = typer.Typer(
    name="trainer",
    help="Train, sample and measure hierarchy-conditioned one-step flow models.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
)


app.command()(train_commands.train)
app.command("train-decoder")(train_commands.train_decoder)


@app.command()
def sample(
    run: Run,
    labels: Annotated[str, typer.Option(help="Class ids or names, separated by commas.")],
    out: Annotated[Path, typer.Option(**PATH, help="Folder of the files.")],
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
    shift: ShiftedBy = None,
    as_json: AsJson = False,
) -> None:
    """Labels and seeds → trajectories, as sheets, pages, safetensors, tars or arrays."""
    from trainer.trajectories.pipeline import TrajectoryPipeline
    from trainer.trajectories.sample_files import parse_formats, write_samples

    numbers, names = parse_seeds(seeds), parse_formats(formats)
    chosen = parse_ending(ending)
    pipe = TrajectoryPipeline.from_pretrained(
        run, ema, decoder, weak=weak, pixel_stage=pixel_stage, ending=chosen, shift=shift
    )
    ids = pipe.label_ids(labels)
    pairs = [(label, seed) for label in ids for seed in numbers]
    if unseen_classes := [*map(pipe.class_name, sorted({*ids} - {*pipe.classes}))]:
        text = f"warning: no image of {', '.join(unseen_classes)} was in the training data"
        stderr.print(text, markup=False, highlight=False)
    strength = _strength(weak, weak_scale)
    drawn = pipe.stream([label for label, _ in pairs], [seed for _, seed in pairs], steps, guidance, strength)
    facts = {"run": run.resolve().name, "weights": ema, "samples": len(pairs)}
    facts |= {"guidance": guidance} if guidance else {}
    facts |= {"autoguidance": strength} if strength else {}
    written = write_samples(drawn, out, names, len(pairs), facts)
    rows = list(_follow(as_json)(written, "sampling", len(pairs)))
    stderr.print(f"wrote {', '.join(names)} to {out}", markup=False, highlight=False)
    print_result(rows, as_json)


for verb in (edit_commands.encode, edit_commands.edit, edit_commands.compare, edit_commands.sweep):
    app.command()(verb)


@app.command()
def evaluate(
    context: typer.Context,
    run: Run,
    shards: Annotated[
        str,
        typer.Option(help="Shards of real images, or a folder of folders such as train and val."),
    ],
    split: Annotated[
        str | None,
        typer.Option(help="Folder of SHARDS to take. Default: one named val… or test…, if there is one."),
    ] = None,
    samples_per_class: Annotated[int, typer.Option(min=1, help="Samples of each class.")] = 8,
    max_real: Annotated[int, typer.Option(min=4, help="Real images read at most.")] = 10_000,
    steps: Steps = 1,
    guidance: GuidanceScale = None,
    weak: Weak = None,
    weak_scale: WeakScale = None,
    likelihood: Annotated[
        bool, typer.Option("--likelihood", help="Bits of the images, of Normalizing Trajectory Models.")
    ] = False,
    ending: EndingName = None,
    shift: ShiftedBy = None,
    inception: Annotated[
        str | None, typer.Option(help="IS and FID by torch-fidelity: file of Inception weights, or hub.")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(**reads("an npz of mu and sigma"), help="npz of mu and sigma of real images, for FID."),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(
            help="Fréchet distance of pictures in the space of an encoder: module:function[:ARGUMENT], for example "
            "hierarchy_builder.encoders:load_encoder:dinov2-reg-base; needs shards with pictures."
        ),
    ] = None,
    edits: Annotated[
        bool, typer.Option("--edits", help="Also locality of edits, over seeds and up to 12 classes.")
    ] = False,
    alignment: Annotated[
        bool, typer.Option("--alignment", help="Also when boundaries of regions appear, likewise.")
    ] = False,
    ema: Ema = "auto",
    decoder: DecoderFolder = None,
    pixel_stage: PixelStageRun = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Metrics of samples, beside real images, noise and chance; kept in RUN for the report."""
    from trainer.data.reader import classes_with_images
    from trainer.evaluation import studies
    from trainer.evaluation.evaluate import evaluate as measure
    from trainer.evaluation.judges import judged_on, open_judges
    from trainer.evaluation.pages import EVALUATION, shown_labels
    from trainer.metrics.frechet import inception_features, read_reference
    from trainer.training.checkpoint import find_checkpoint, load_state
    from trainer.trajectories.photos import load_own_encoder
    from trainer.trajectories.pipeline import TrajectoryPipeline

    refuse_beside_likelihood(context)
    if inception not in (None, "hub") and not Path(inception).is_file():
        raise UsageError(
            f"--inception {inception} does not exist, expected a file of Inception weights, or hub"
        )
    if reference is not None and inception is None:
        raise UsageError("--reference is of real images in the space of Inception: add --inception FILE")
    index = open_judges(shards, split)
    ending_name = parse_ending(ending)
    pipe = TrajectoryPipeline.from_pretrained(
        run, ema, decoder, weak=weak, pixel_stage=pixel_stage, ending=ending_name, shift=shift
    )
    follow = _follow(as_json or quiet)
    trained = load_state(find_checkpoint(run)).shards
    judged = judged_on(trained, index, min(max_real, index.num_samples))
    if not quiet:
        stderr.print(f"{judged} Read from {index.url}.", markup=False, highlight=False, soft_wrap=True)
    if likelihood:
        _print_metrics(studies.measure_likelihood(run, pipe, index, max_real, steps, ema, follow), as_json)
        return
    if alignment:
        studies.check_has_paths(pipe)
    if edits:
        studies.check_has_levels(pipe)
    strength = _strength(weak, weak_scale)
    measured = measure(
        pipe,
        index,
        samples_per_class=samples_per_class,
        num_steps=steps,
        max_real=max_real,
        guidance=guidance,
        weak_scale=strength,
        inception=None
        if inception is None
        else inception_features(None if inception == "hub" else inception),
        reference=None if reference is None else read_reference(reference),
        space=None if space is None else load_own_encoder(space),
        follow=follow,
    )
    metrics = list(measured)
    classes = classes_with_images(index, max_real)
    settings = (pipe, run, shown_labels(classes), range(samples_per_class))
    metrics += studies.edit_study(*settings, steps, follow, classes) if edits else []
    if alignment:
        photos = studies.photos_of(pipe, index, len(settings[2]) * samples_per_class)
        metrics += studies.alignment_study(*settings, photos=photos, follow=follow)
    rows = [{"name": name, "value": value} for name, value in metrics]
    setup = {
        "samples_per_class": samples_per_class,
        "num_steps": steps,
        "guidance": guidance,
        "weak_scale": strength,
        "ending": ending,
        "shift": shift,
        "space": space,
        "ema": ema,
        "shards": index.name,
        "split": index.split,
        "judged_on": judged,
        "classes": classes,
    }
    write_json(run / EVALUATION, {**setup, "metrics": rows}, sort_keys=False)
    _print_metrics(rows, as_json)


@app.command()
def report(
    run: Annotated[
        Path,
        typer.Argument(
            **reads("a run folder of `trainer train`", "RUN"), help="Run folder of `trainer train`."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(**PATH, help="HTML file to write. Default: RUN/report.html.")
    ] = None,
    shards: Annotated[
        str | None, typer.Option(help="Shards whose teachers are shown beside samples.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of each class shown.")] = "0",
    stages: Annotated[
        Path | None,
        typer.Option(
            **reads("a JSON file"),
            help="JSON rows of a table to show, as `hierarchy-builder build --json` prints.",
        ),
    ] = None,
    edits: Annotated[
        list[Path] | None,
        typer.Option(
            "--edit", **reads(A_TRAJECTORY), help="Edited trajectory to show; may be given several times."
        ),
    ] = None,
    sweep_file: Annotated[
        Path | None,
        typer.Option(
            "--sweep", **reads("what `trainer sweep --out` wrote"), help="What `trainer sweep --out` wrote."
        ),
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
    from hierarchy_builder.files import target_of
    from trainer.data.shards import open_index
    from trainer.evaluation.evaluate import check_fits
    from trainer.evaluation.pages import (
        edits_section,
        known_classes,
        read_sweep,
        run_page,
        shown_labels,
        sweep_section,
    )
    from trainer.trajectories.pipeline import TrajectoryPipeline
    from trainer.trajectories.trajectory import Trajectory

    numbers = parse_seeds(seeds)
    target = target_of(out or run / "report.html")  # refused before anything is drawn
    pipe = TrajectoryPipeline.from_pretrained(run, ema, decoder, weak=weak, pixel_stage=pixel_stage)
    index = open_index(shards) if shards else None
    if index is not None:
        check_fits(pipe, index)
    classes = known_classes(run, pipe, index)
    pairs = [(label, seed) for label in shown_labels(classes) for seed in numbers]
    labels, chosen = [label for label, _ in pairs], [seed for _, seed in pairs]
    trajectories = pipe(labels, chosen, guidance=guidance, weak_scale=_strength(weak, weak_scale))
    rows = _load_rows(stages) if stages else []
    more = [sweep_section(read_sweep(sweep_file))] if sweep_file else []
    if edits:
        more.insert(0, edits_section([pipe.adopt(Trajectory.load(path)) for path in edits]))
    page = run_page(run, pipe, trajectories, index, rows, more)
    write_page(page, target)
    print(out or run / "report.html")


@app.command()
def studio(
    run: Run,
    folder: Annotated[
        Path | None, typer.Option(help="Where trajectories and reports are kept. Default: RUN/studio.")
    ] = None,
    vocabulary: VocabularyFile = None,
    host: Annotated[
        str, typer.Option(help="Address to serve on; others can reach it if it is not this one.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65_535, help="Port; by default the first free one from 7860.")
    ] = None,
    ema: Ema = "auto",
    decoder: DecoderFolder = None,
) -> None:
    """Look at trajectories in a browser, edit, resume, compare and save them (the extra `studio`)."""
    try:
        from trainer.studio.app import launch
    except ModuleNotFoundError as error:
        raise TrainerError(
            f"{error.name} is not installed: install the extra, pip install 'trajectory-hierarchies[studio]'"
        ) from None
    from trainer.trajectories.pipeline import TrajectoryPipeline

    pipe = TrajectoryPipeline.from_pretrained(run, ema, decoder)
    launch(pipe, folder or run / "studio", vocabulary, host=host, port=port)


@app.command()
def import_official(
    file: Annotated[
        Path,
        typer.Argument(
            **reads("a checkpoint file of the authors' release", "FILE"),
            help="Checkpoint file of the authors' release.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(**PATH, help="Run folder to write; sample from it, or train on in it.")
    ],
    ema: Annotated[str | None, typer.Option(help="Half-life in kimg of the average to sample from.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            **reads("the configuration of that checkpoint"),
            help="Its config.json. Default: beside FILE or in the folder above.",
        ),
    ] = None,
    encoder: Annotated[
        str, typer.Option(help="Encoder whose features it was trained on.")
    ] = "dinov2-reg-base",
    as_json: AsJson = False,
) -> None:
    """Checkpoint of the release → run folder, with all averages and the optimiser."""
    from trainer.methods.trajectory_forcing.exchange import import_official as convert

    print_result(convert(file, out, config, ema, encoder), as_json)


@app.command()
def export_official(
    run: Run,
    out: Annotated[Path, typer.Option(**PATH, help="Folder of checkpoint_<step> and config.json.")],
    as_json: AsJson = False,
) -> None:
    """Run folder → checkpoint of the release; what was imported comes out equal."""
    from trainer.methods.trajectory_forcing.exchange import export_official as convert

    print_result(convert(run, out), as_json)


app.command()(train_commands.presets)


def main() -> NoReturn:
    """Run `trainer` and leave with the exit code of what happened; an error is printed as `error: …`."""
    run_command(app)


def _print_metrics(rows: list[dict[str, Any]], as_json: bool) -> None:
    """A table for each topic, or all rows as JSON."""
    if as_json:
        print_result(rows, as_json)
        return
    for topic, own in metric_tables(rows).items():
        print_result(own, as_json, topic.title, topic.note)


def _follow(is_quiet: bool) -> Follow:
    return unseen if is_quiet else shown_on(stderr)


def _strength(weak: Path | None, weak_scale: float | None) -> float:
    """Strength of autoguidance, by its two options."""
    return weak_scale if weak_scale is not None else float(weak is not None)


def _load_rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--stages {path}: {error}") from None
    if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise UsageError(f"--stages {path}: expected a list of rows, column to value")
    return rows


if __name__ == "__main__":
    main()
