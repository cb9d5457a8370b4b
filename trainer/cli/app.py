"""The command `trainer`: parse, call, print. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from hierarchy_builder.errors import TrainerError, UsageError, VerificationError
from hierarchy_builder.files.untrusted.documents import parse_json, read_document
from hierarchy_builder.files.whole import refuse_links, write_sealed_json
from hierarchy_builder.flags import (
    OUTPUT,
    PATH,
    PLACE,
    REQUIRED,
    Parameter,
    argument,
    grouped,
    new_app,
    option,
    switch,
    takes,
)
from hierarchy_builder.machine.doctor import doctor
from hierarchy_builder.machine.installing import install_extras
from hierarchy_builder.terminal import counted, print_json, print_result, say, say_next, stdout
from hierarchy_builder.terminal import run as run_command
from trainer.cli import editing as edit_commands
from trainer.cli import judging
from trainer.cli import options as opt
from trainer.cli import post_training as post_train_commands
from trainer.cli import training as train_commands
from trainer.cli.options import A_TRAJECTORY, names_given, reads
from trainer.evaluation.tables import VARIETY, metric_tables, variety_verdict
from trainer.seeds import parse_seeds

app = new_app("trainer", "Train, sample and measure hierarchy-conditioned one-step flow models.")
TRAIN, DRAW, MEASURE, RELEASE = "Train", "Sample and edit", "Measure and look", "The authors' release"


app.command(rich_help_panel=TRAIN)(train_commands.train)
app.command("train-decoder", rich_help_panel=TRAIN)(train_commands.train_decoder)
app.command("post-train", rich_help_panel=TRAIN)(post_train_commands.post_train)
app.command(rich_help_panel=TRAIN)(train_commands.presets)


@app.command(rich_help_panel=DRAW)
@takes(
    run=opt.RUN,
    labels=option("Class ids or names, separated by commas.", default=REQUIRED),
    out=option("Folder of the files.", default=REQUIRED, **PATH),
    seeds=opt.SEEDS,
    formats=option(
        "Any of png, html, safetensors, webdataset, npz.", "--format", default="png,html,safetensors"
    ),
    steps=opt.STEPS,
    temperature=opt.TEMPERATURE,
    **opt.GUIDED,
    ema=opt.EMA,
    decoder=opt.DECODER,
    pixel_stage=opt.PIXEL_STAGE,
    **opt.OF_METHODS,
    **OUTPUT,
)
def sample(run: Path, labels: str, out: Path, **given: Any) -> None:
    """Draw trajectories of labels and seeds, as sheets, pages, safetensors, tars or arrays."""
    from trainer.training.mirror import named
    from trainer.trajectories.sample_files import parse_formats, write_samples

    seeds, formats = parse_seeds(given["seeds"]), parse_formats(given["formats"])
    pipe, how = opt.open_run(run, given), opt.sampling_of(given, given["steps"])
    labels_drawn = pipe.label_ids(labels)
    if unseen_classes := [*map(pipe.class_name, sorted({*labels_drawn} - {*pipe.classes}))]:
        say(f"warning: no image of {', '.join(unseen_classes)} was in the training data")
    ids, numbers = zip(*itertools.product(labels_drawn, seeds), strict=True)
    drawn = pipe.stream(ids, numbers, **how)
    facts = {"run": named(run).resolve().name, "weights": given["ema"], "samples": len(ids)}
    facts |= {"guidance": how["guidance"]} if how["guidance"] else {}
    facts |= {"autoguidance": how["weak_scale"]} if how["weak_scale"] else {}
    facts |= {"temperature": how["temperature"]} if how["temperature"] != 1 else {}
    written = write_samples(drawn, out, formats, len(ids), facts)
    print_result(list(opt.follow_for(given)(written, "sampling", len(ids))), given["as_json"])
    files = sorted(out.rglob("*.safetensors")) if "safetensors" in formats else []
    look = [*(("trainer", "edit", file, "--list") for file in files[:1]), ("trainer", "report", named(run))]
    say_next(f"wrote {', '.join(formats)} to {out}", look, given["quiet"])


for verb in (edit_commands.encode, edit_commands.edit, edit_commands.compare, edit_commands.sweep):
    app.command(rich_help_panel=DRAW)(verb)


OF_SAMPLES: dict[str, Parameter] = {
    "samples_per_class": option("Samples of each class.", kind=int, default=8, min=1),
    "temperature": opt.TEMPERATURE,
    **opt.GUIDED,
    **opt.OF_METHODS,
    "decoder": opt.DECODER,
    "pixel_stage": opt.PIXEL_STAGE,
    **grouped(
        "What is measured",
        inception=option(
            "Inception Score and FID by torch-fidelity: file of Inception weights, or hub.", **PLACE
        ),
        reference=option(
            "With --inception: npz of mu and sigma of real images, for FID.",
            **reads("an npz of mu and sigma"),
        ),
        space=option(
            "Fréchet distance of pictures in the space of an encoder: its name, for example "
            "dinov2-reg-base, or module:function[:ARGUMENT]; needs shards with pictures."
        ),
        edits=switch("Also measure how local edits are, over seeds and up to 12 classes.", "--edits"),
        alignment=switch(
            "Also measure at which step the boundaries of regions appear, for the classes and seeds of --edits.",
            "--alignment",
        ),
    ),
    **judging.FDR,
}
"""Options of `evaluate` that say how samples are drawn, or what is measured of them."""


@app.command(rich_help_panel=MEASURE)
@takes(
    run=opt.RUN,
    shards=option(
        "Shards of real images, or a folder of folders such as train and val; may be given several times.",
        default=REQUIRED,
        **PLACE | {"kind": list[str]},
    ),
    split=option("Folder of SHARDS to take. Default: one named val… or test…, if there is one."),
    max_real=option("Real images read at most.", kind=int, default=10_000, min=4),
    steps=opt.STEPS,
    **grouped(
        "What is measured",
        likelihood=switch(
            "Normalizing Trajectory Models: measure the likelihood of the images in SHARDS, and draw no samples.",
            "--likelihood",
        ),
    ),
    **OF_SAMPLES,
    ema=opt.EMA,
    **OUTPUT,
)
def evaluate(
    run: Path, shards: list[str], split: str | None, max_real: int, steps: int, **given: Any
) -> None:
    """Measure samples and compare them with real images, noise and guessing; RUN keeps the result for the report."""
    from trainer.data.reader import classes_with_images
    from trainer.evaluation import studies
    from trainer.evaluation.evaluate import evaluate as measure
    from trainer.evaluation.judges import judged_on, open_judges
    from trainer.evaluation.pages import EVALUATION, shown_labels
    from trainer.metrics.frechet import inception_features, read_reference
    from trainer.training.checkpoint import read_checkpoint
    from trainer.training.mirror import named
    from trainer.trajectories.photos import load_own_encoder

    refuse_links(run, [EVALUATION, studies.EDITS, studies.ALIGNMENT, studies.LIKELIHOOD])
    as_json, ema = given["as_json"], given["ema"]
    inception, reference, space = given["inception"], given["reference"], given["space"]
    if given["likelihood"] and (sampling := names_given(OF_SAMPLES, given)):
        raise UsageError(
            f"--likelihood does not go with {', '.join('--' + name.replace('_', '-') for name in sampling)}: it is of "
            "real images and draws no samples; leave out the one or the other"
        )
    if inception not in (None, "hub") and not Path(inception).is_file():
        raise UsageError(
            f"--inception {inception} does not exist, expected a file of Inception weights, or hub"
        )
    if reference is not None and inception is None:
        raise UsageError("--reference is of real images in the space of Inception: add --inception FILE")
    index = open_judges(shards, split)
    pipe = opt.open_run(run, given)
    follow = opt.follow_for(given)
    _, trained = read_checkpoint(run)
    judged = judged_on(trained.shards, index, min(max_real, index.num_samples))
    say(f"{judged} Read from {index.url}.", given["quiet"])
    if given["likelihood"]:
        _print_metrics(studies.measure_likelihood(run, pipe, index, max_real, steps, ema, follow), as_json)
        return
    if given["alignment"]:
        studies.check_has_paths(pipe)
    if given["edits"]:
        studies.check_has_levels(pipe)
    drawing = {"samples_per_class": given["samples_per_class"], **opt.sampling_of(given, steps)}
    classes = classes_with_images(index, max_real)
    if given["fdr"]:
        rows = judging.measured(
            pipe, index, classes, trained.config, given, **drawing, max_real=max_real, follow=follow
        )
        print_result(rows, as_json)
        return
    measured = measure(
        pipe,
        index,
        **drawing,
        max_real=max_real,
        inception=inception and inception_features(None if inception == "hub" else inception),
        reference=reference and read_reference(reference),
        space=space and load_own_encoder(space),
        follow=follow,
    )
    metrics = list(measured)
    labels, seeds = shown_labels(classes), range(given["samples_per_class"])
    if given["edits"]:
        metrics += studies.edit_study(pipe, run, labels, seeds, steps, follow, classes)
    if given["alignment"]:
        photos = studies.photos_of(pipe, index, len(labels) * len(seeds))
        metrics += studies.alignment_study(pipe, run, labels, seeds, photos=photos, follow=follow)
    rows = [{"name": name, "value": value} for name, value in metrics]
    setup = drawing | {name: given[name] for name in ("ending", "shift", "space", "ema")}
    setup |= {"shards": index.name, "split": index.split, "judged_on": judged, "classes": classes}
    write_sealed_json(run / EVALUATION, {**setup, "metrics": rows}, sort_keys=False)
    _print_metrics(rows, as_json)
    say_next(
        f"the figures lie in {named(run / EVALUATION)}", [("trainer", "report", named(run))], given["quiet"]
    )


@app.command(rich_help_panel=MEASURE)
@takes(
    run=opt.RUN,
    out=option("HTML file to write. Default: RUN/report.html.", **PATH),
    shards=option(
        "Shards whose teachers are shown next to samples; may be given several times.",
        **PLACE | {"kind": list[str]},
    ),
    seeds=option("Seeds of each class shown.", default="0"),
    stages=option(
        "JSON rows of a table to show, as `hierarchy-builder build --json` prints them.",
        **reads("a JSON file"),
    ),
    edits=option(
        "Edited trajectory to show; may be given several times.",
        "--edit",
        **reads(A_TRAJECTORY) | {"kind": list[Path]},
    ),
    sweep_file=option(
        "File that `trainer sweep --out` wrote.", "--sweep", **reads("what `trainer sweep --out` wrote")
    ),
    temperature=opt.TEMPERATURE,
    **opt.GUIDED,
    ema=opt.EMA,
    decoder=opt.DECODER,
    pixel_stage=opt.PIXEL_STAGE,
    **OUTPUT,
)
def report(run: Path, out: Path | None, shards: list[str] | None, **given: Any) -> None:
    """Write one HTML page of a run: samples, curves, scores and configuration."""
    from hierarchy_builder.canvases.gallery import write_page
    from hierarchy_builder.files.whole import target_of
    from trainer.data.shards import open_index
    from trainer.evaluation import pages
    from trainer.evaluation.evaluate import check_fits
    from trainer.training.mirror import named
    from trainer.trajectories.trajectory import Trajectory

    seeds, out = parse_seeds(given["seeds"]), out or run / "report.html"
    target = target_of(out)  # refused before anything is drawn
    pipe = opt.open_run(run, given)
    index = open_index(shards) if shards else None
    if index is not None:
        check_fits(pipe, index)
    shown = pages.shown_labels(pages.known_classes(run, pipe, index))
    labels, numbers = zip(*itertools.product(shown, seeds), strict=True)
    trajectories = pipe(labels, numbers, **opt.sampling_of(given))
    rows = _load_rows(given["stages"]) if given["stages"] else []
    more = []
    if given["edits"]:
        more.append(pages.edits_section([pipe.adopt(Trajectory.load(path)) for path in given["edits"]]))
    if given["sweep_file"]:
        more.append(pages.sweep_section(pages.read_sweep(given["sweep_file"])))
    write_page(pages.run_page(run, pipe, trajectories, index, rows, more), target)
    if given["as_json"]:
        print_json({"page": str(named(out))})
    else:
        print(named(out))


@app.command(rich_help_panel=MEASURE)
@takes(run=opt.RUN, **OUTPUT)
def verify(run: Path, as_json: bool, quiet: bool) -> None:
    """Read every file of a run and compare it with its checksum; exit code 4 if something is damaged."""
    from trainer.evaluation.verify import verify_run
    from trainer.training.mirror import named

    found, name = list(verify_run(run)), named(run)
    problems = [
        each.text if str(run) in each.text else f"{name / each.file}: {each.text}"
        for each in found
        if each.is_damaged
    ]
    unchecked = {each.file: each.text for each in found if not each.is_damaged}
    if as_json:
        print_json({"problems": problems, "unchecked": unchecked})
    else:
        for text in (*problems, *(f"not checked: {name / file}: {why}" for file, why in unchecked.items())):
            stdout.print(text, markup=False, highlight=False, soft_wrap=True)
    if problems:
        raise VerificationError(
            f"{name}: found {counted(len(problems), 'problem')}, expected none; move a damaged checkpoint away, and "
            "the same training command goes on from the one before; remove another damaged file, and the command that "
            "wrote it writes it again"
        )
    if not as_json:
        stdout.print(f"{name}: everything that was checked is in order", markup=False, highlight=False)


@app.command(rich_help_panel=DRAW)
@takes(
    run=opt.RUN,
    folder=option("Where trajectories and reports are kept. Default: RUN/studio.", **PATH),
    vocabulary=opt.VOCABULARY,
    host=option(
        "Address to serve on; at any other than the default, other machines can reach it.",
        default="127.0.0.1",
    ),
    port=option("Port. Default: the first free one from 7860.", kind=int, min=1, max=65_535),
    allowed_hosts=option(
        "Another name under which browsers reach this server, such as that of a proxy; may be given several times. "
        "Requests under any other name are refused.",
        "--allow-host",
        kind=list[str],
    ),
    ema=opt.EMA,
    decoder=opt.DECODER,
    **OUTPUT,
)
def studio(
    run: Path,
    folder: Path | None,
    vocabulary: Path | None,
    host: str,
    port: int | None,
    allowed_hosts: list[str] | None,
    **given: Any,
) -> None:
    """Look at trajectories in a browser, edit, resume, compare and save them; needs the extra `studio`."""
    from trainer.studio.address import bypass_proxy, check_host

    check_host(host)
    bypass_proxy(host)
    try:
        from trainer.studio.app import launch
    except ModuleNotFoundError as error:
        raise TrainerError(
            f"{error.name} is not installed, which the studio needs: {install_extras('studio')}"
        ) from None

    folder, pipe = folder or run / "studio", opt.open_run(run, given)
    names = allowed_hosts or ()
    page, url = launch(pipe, folder, vocabulary, host=host, port=port, block=False, allowed_hosts=names)
    if given["as_json"]:
        print_json({"url": url, "folder": str(folder)})
    else:
        print(url)
    sys.stdout.flush()
    say(f"open {url} in a browser; saved work lies in {folder}; Ctrl-C ends", given["quiet"])
    with contextlib.redirect_stdout(sys.stderr):  # gradio prints a line at its end
        page.block_thread()


@app.command(rich_help_panel=RELEASE)
@takes(
    file=argument(
        "Checkpoint file of the authors' release, such as TF_B of huggingface.co/mervekocabas/TrajectoryForcing.",
        **reads("a checkpoint file of the authors' release", "FILE"),
    ),
    out=option("Run folder to write; sample from it, or continue its training.", default=REQUIRED, **PATH),
    ema=option(
        "Weight average to sample from, by its half-life in thousands of images. Default: the first in the file."
    ),
    config=option(
        "Its config.json. Default: the one next to FILE or in the folder above, else the shapes of its weights.",
        **reads("the configuration of that checkpoint"),
    ),
    encoder=option("Encoder whose features it was trained on.", default="dinov2-reg-base"),
    **OUTPUT,
)
def import_official(
    file: Path, out: Path, ema: str | None, config: Path | None, encoder: str, as_json: bool, quiet: bool
) -> None:
    """Turn a checkpoint of the release into a run folder, with all averages and the optimiser."""
    from trainer.methods.trajectory_forcing.exchange import import_official as convert

    print_result(convert(file, out, config, ema, encoder), as_json)
    say_next(
        f"the run lies in {out}", [("trainer", "sample", out, "--labels", "0", "--out", out / "drawn")], quiet
    )


@app.command(rich_help_panel=RELEASE)
@takes(
    run=opt.RUN,
    out=option("Folder of checkpoint_<step> and config.json.", default=REQUIRED, **PATH),
    **OUTPUT,
)
def export_official(run: Path, out: Path, as_json: bool, quiet: bool) -> None:
    """Turn a run folder into a checkpoint of the release; an imported one comes out with equal content."""
    from trainer.methods.trajectory_forcing.exchange import export_official as convert

    print_result(convert(run, out), as_json)
    say_next(f"the checkpoint lies in {out}", [], quiet)


app.command(rich_help_panel=MEASURE)(doctor)


def main() -> NoReturn:
    """Run `trainer` and leave with the exit code of what happened; an error is printed as `error: …`."""

    def command() -> None:
        try:
            app()
        finally:
            if mirror := sys.modules.get("trainer.training.mirror"):  # loaded if a run may lie at a URL
                mirror.send_findings()

    rank = os.environ.get("RANK") if os.environ.get("WORLD_SIZE", "1") != "1" else None
    run_command(command, who=f"rank {rank}: " if rank else "")


def _print_metrics(rows: list[dict[str, Any]], as_json: bool) -> None:
    """A table for each topic, or all rows as JSON."""
    if as_json:
        print_result(rows, as_json)
        return
    verdict = variety_verdict({row["name"]: row["value"] for row in rows})
    for topic, own in metric_tables(rows).items():
        note = f"{topic.note} {verdict}" if topic is VARIETY else topic.note
        print_result(own, as_json, topic.title, note)


def _load_rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = parse_json(read_document(path))
    except (OSError, ValueError) as error:
        raise UsageError(f"--stages {path}: {error}") from None
    if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise UsageError(f"--stages {path}: expected a list of rows, column to value")
    return rows
