"""The command `hierarchy-builder`: parse, call, print. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.table import Table

from hierarchy_builder import options as opt
from hierarchy_builder.artefacts import BuildFolder
from hierarchy_builder.config import (
    ExtractConfig,
    HierarchyRecipe,
    ShardConfig,
    to_mapping,
)
from hierarchy_builder.console import print_json, print_stages, print_table, run, show_config, stderr, stdout
from hierarchy_builder.errors import UsageError, VerificationError

app = typer.Typer(
    name="hierarchy-builder",
    help="Images → features → nested regions → webdataset shards of level canvases.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
)


@app.command()
def extract(
    images: Annotated[str, typer.Argument(help="The images, or DIR of a build to go on with.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the build.")] = None,
    encoder: opt.Encoder = None,
    weights: opt.Weights = None,
    split: opt.InputSplit = None,
    class_map: opt.ClassMap = None,
    precision: opt.Precision = None,
    batch_size: opt.BatchSize = None,
    block_rows: opt.BlockRows = None,
    order: opt.Order = None,
    max_bad_fraction: opt.MaxBad = None,
    workers: opt.WorkerCount = None,
    address: opt.Address = None,
    config: opt.ConfigFile = None,
    fresh: opt.Fresh = False,
    retry_failed: opt.RetryFailed = False,
    accept_new_files: opt.AcceptNew = False,
    force: opt.Force = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Images → index.parquet and features.zarr."""
    flags = opt.of_config(ExtractConfig, locals())
    from hierarchy_builder import build as steps

    folder, source = (BuildFolder(out), images) if out else (BuildFolder(Path(images)).require(), None)
    stored = _stored(folder, "extract", fresh=False) if source is None else None
    resolved = opt.resolve(ExtractConfig, "extract", flags, config, stored)
    show_config({"extract": to_mapping(resolved)}, quiet)
    session = _session(workers, address, fresh, quiet, force)
    with folder.locked():
        summary = steps.extract(
            folder,
            source,
            resolved,
            session,
            class_map=class_map,
            retry_failed=retry_failed,
            accept_new_files=accept_new_files,
        )
        print_stages([summary], as_json)


@app.command()
def cluster(
    folder: opt.Folder,
    recipe: opt.Recipe = None,
    cuts: opt.Cuts = None,
    spatial_weight: opt.SpatialWeight = None,
    start: opt.Start = None,
    seed: opt.Seed = None,
    object_choice: opt.ObjectChoice = None,
    connected: opt.Connected = None,
    divide_background: opt.DivideBackground = None,
    min_spread: opt.MinSpread = None,
    masks: opt.Masks = None,
    masks_level: opt.MasksLevel = None,
    recut: opt.Recut = None,
    vocabulary: opt.Vocabulary = None,
    backend: opt.Backend = None,
    workers: opt.WorkerCount = None,
    address: opt.Address = None,
    config: opt.ConfigFile = None,
    fresh: opt.Fresh = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """features.zarr → regions.zarr; with --vocabulary also prototypes of the whole dataset."""
    arguments = locals()
    from hierarchy_builder import build as steps

    build_folder = BuildFolder(folder).require()
    if recut is not None:
        _recut(build_folder, arguments)
        return
    resolved = opt.resolve_recipe(arguments, config, _stored(build_folder, "cluster", fresh))
    words = opt.resolve_vocabulary(vocabulary, backend, config, _stored(build_folder, "vocabulary", fresh))
    show_config(
        {"hierarchy": to_mapping(resolved), **({"vocabulary": to_mapping(words)} if words else {})}, quiet
    )
    session = _session(workers, address, fresh, quiet)
    with build_folder.locked():
        summaries = [steps.vocabulary(build_folder, words, session)] if words else []
        summaries.append(steps.cluster(build_folder, resolved, session))
        if words:
            summaries.append(steps.link(build_folder, session))
        print_stages(summaries, as_json)


@app.command()
def shard(
    folder: opt.Folder,
    split: opt.Split = None,
    samples_per_shard: opt.SamplesPerShard = None,
    shard_bytes: opt.ShardBytes = None,
    feature_dtype: opt.FeatureDtype = None,
    images: opt.WithImages = None,
    canvases: opt.WithCanvases = None,
    covariance: opt.WithCovariance = None,
    publish: opt.PublishTo = None,
    workers: opt.WorkerCount = None,
    address: opt.Address = None,
    config: opt.ConfigFile = None,
    fresh: opt.Fresh = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Stores → webdataset tars."""
    flags = opt.of_config(ShardConfig, locals())
    from hierarchy_builder import build as steps

    build_folder = BuildFolder(folder).require()
    resolved = opt.resolve(ShardConfig, "shard", flags, config, _stored(build_folder, "shard", fresh))
    show_config({"shard": to_mapping(resolved)}, quiet)
    session = _session(workers, address, fresh, quiet)
    with build_folder.locked():
        summaries = [steps.shard(build_folder, resolved, session)]
        print_stages(summaries + _publish(build_folder, publish, session), as_json)


@app.command()
def build(
    images: opt.Images,
    out: opt.Out,
    encoder: opt.Encoder = None,
    weights: opt.Weights = None,
    split: Annotated[
        str | None, typer.Option(help="First part of the shard names; IMAGES/SPLIT is taken where it exists.")
    ] = None,
    class_map: opt.ClassMap = None,
    precision: opt.Precision = None,
    batch_size: opt.BatchSize = None,
    block_rows: opt.BlockRows = None,
    order: opt.Order = None,
    max_bad_fraction: opt.MaxBad = None,
    recipe: opt.Recipe = None,
    cuts: opt.Cuts = None,
    spatial_weight: opt.SpatialWeight = None,
    start: opt.Start = None,
    seed: opt.Seed = None,
    object_choice: opt.ObjectChoice = None,
    connected: opt.Connected = None,
    divide_background: opt.DivideBackground = None,
    min_spread: opt.MinSpread = None,
    masks: opt.Masks = None,
    masks_level: opt.MasksLevel = None,
    vocabulary: opt.Vocabulary = None,
    backend: opt.Backend = None,
    samples_per_shard: opt.SamplesPerShard = None,
    shard_bytes: opt.ShardBytes = None,
    feature_dtype: opt.FeatureDtype = None,
    with_images: opt.WithImages = None,
    canvases: opt.WithCanvases = None,
    covariance: opt.WithCovariance = None,
    workers: opt.WorkerCount = None,
    address: opt.Address = None,
    config: opt.ConfigFile = None,
    fused: opt.Fused = False,
    publish: opt.PublishTo = None,
    fresh: opt.Fresh = False,
    retry_failed: opt.RetryFailed = False,
    accept_new_files: opt.AcceptNew = False,
    force: opt.Force = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """extract, cluster and shard in one go; the same command resumes."""
    arguments = locals()
    from hierarchy_builder import build as steps

    folder, plan = BuildFolder(out), _build_plan(arguments)
    show_config(plan.as_mapping(), quiet)
    session = _session(workers, address, fresh, quiet, force)
    with folder.locked():
        once = {"retry_failed": retry_failed, "accept_new_files": accept_new_files, "fused": fused}
        summaries = steps.build(folder, images, plan, session, class_map=class_map, **once)
        print_stages(summaries + _publish(folder, publish, session), as_json)


def _takes_arguments_of(
    command: Callable[..., None], *, without: Sequence[str]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Declare the parameters of another command, so that the same words mean the same to both."""

    def declare(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        kept = [given for given in signature.parameters.values() if given.name not in without]
        function.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        return function

    return declare


@app.command()
@_takes_arguments_of(build, without=["retry_failed", "accept_new_files", "fused", "publish"])
def plan(**arguments: Any) -> None:
    """What build would make of the same words: images, bytes, seconds, shards, what is done; tries some of them."""
    from hierarchy_builder.plan import make_plan, plan_tables

    folder, quiet = BuildFolder(arguments["out"]), arguments["quiet"]
    config = _build_plan(arguments)
    show_config(config.as_mapping(), quiet)
    session = _session(
        arguments["workers"], arguments["address"], arguments["fresh"], quiet, arguments["force"]
    )
    found = make_plan(folder, arguments["images"], config, session, class_map=arguments["class_map"])
    if arguments["as_json"]:
        print_json(found.as_json())
    else:
        for title, rows in plan_tables(found).items():
            print_table(title, rows)
    found.check(folder, force=arguments["force"])


@app.command("publish")
def publish_shards(
    folder: opt.Folder,
    url: Annotated[str, typer.Argument(help="Where to, as fsspec names it, for example s3://bucket/set.")],
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Copy finished shards to another file system; the same command sends what is missing."""
    build_folder = BuildFolder(folder).require()
    with build_folder.locked():
        print_stages(_publish(build_folder, url, _session(0, None, False, quiet)), as_json)


@app.command()
def status(folder: opt.Folder, as_json: opt.AsJson = False) -> None:
    """What is done, stage by stage, read from the markers; and how the run goes that works on it now."""
    from hierarchy_builder.progress import as_duration, running_stage
    from hierarchy_builder.units import progress_of

    build_folder = BuildFolder(folder).require()
    rows, running = progress_of(build_folder), running_stage(build_folder)
    if as_json:
        of_stage = running["stage"] if running else None
        print_json([{**row, "running": running if row["stage"] == of_stage else None} for row in rows])
        return
    table = Table("stage", "units", "images", "unit seconds", "bytes", "state")
    for row in rows:
        units = f"{row['units_done']}/{row['units']}"
        table.add_row(
            row["stage"],
            units,
            f"{row['images']:,}",
            f"{row['seconds']:.1f}",
            f"{row['bytes']:,}",
            row["state"],
        )
    stdout.print(table)
    if running:
        left = running["remaining_s"]
        stdout.print(
            f"running: {running['stage']}, {running['images_done']}/{running['images']} images, "
            f"{running['images_per_second']:.1f} images/s, {running['failed']} could not be used, "
            f"{'?' if left is None else as_duration(left)} left",
            highlight=False,
        )


@app.command()
def verify(folder: opt.Folder, as_json: opt.AsJson = False) -> None:
    """Read everything and check it against what was written; exit code 4 when something is wrong."""
    from hierarchy_builder.verify import find_problems

    problems = list(find_problems(BuildFolder(folder)))
    if as_json:
        print_json({"problems": problems})
    else:
        for problem in problems:
            stdout.print(problem, markup=False, highlight=False, soft_wrap=True)
    if problems:
        raise VerificationError(
            f"{folder}: found {len(problems)} problems, expected none; run `hierarchy-builder repair {folder}`, "
            "or start what is damaged over with --fresh"
        )
    if not as_json:
        stdout.print(f"{folder}: everything is in order")


@app.command()
def repair(
    folder: opt.Folder,
    workers: opt.WorkerCount = None,
    address: opt.Address = None,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Do again what verify finds damaged, and only that; exit code 4 when something could not be mended."""
    from hierarchy_builder.repair import repair as mend

    build_folder = BuildFolder(folder).require(damaged=True)
    session = _session(workers, address, False, quiet)
    with build_folder.locked():
        mended = mend(build_folder, session)
    if as_json:
        print_json({"mended": [dataclasses.asdict(damage) for damage in mended]})
    else:
        stdout.print(f"{folder}: {len(mended)} problems mended", highlight=False)


@app.command()
def report(
    folder: opt.Folder,
    out: Annotated[
        Path | None,
        typer.Option(help="The page; by default DIR/report.html, quality.html or vocabulary.html."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, help="Images, spread evenly over the classes: 48 on the page, with --quality 200 scored."
        ),
    ] = None,
    keys: Annotated[str | None, typer.Option(help="Keys of the images instead, comma separated.")] = None,
    quality: Annotated[
        bool, typer.Option("--quality", help="Score the regions and their stability; also DIR/quality.json.")
    ] = False,
    masks: Annotated[
        Path | None, typer.Option(help="With --quality: folder of label maps <stem>_<k>.png to agree with.")
    ] = None,
    vocabulary: Annotated[
        bool, typer.Option("--vocabulary", help="Show the prototypes by the parts nearest to them instead.")
    ] = False,
    prototypes: Annotated[int, typer.Option(min=1, help="With --vocabulary: prototypes on the page.")] = 64,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """A self-contained page: photo, region maps, PCA colours, decoded levels, with a slider coarse → fine."""
    build_folder, chosen = BuildFolder(folder).require(), keys.split(",") if keys else None
    if quality and vocabulary:
        raise UsageError("--quality and --vocabulary are two pages: ask for one at a time")
    if quality:
        _report_quality(build_folder, out, samples or 200, chosen, masks, as_json, quiet)
        return
    if masks is not None or as_json:
        raise UsageError("--masks and --json belong to --quality, which is not given")
    if vocabulary:
        from hierarchy_builder.vocabulary_page import write_vocabulary_page

        page = write_vocabulary_page(build_folder, out or build_folder.vocabulary_page, limit=prototypes)
    else:
        from hierarchy_builder.inspection import write_report

        page = write_report(build_folder, out or build_folder.report, limit=samples or 48, keys=chosen)
    stdout.print(str(page), markup=False, highlight=False, soft_wrap=True)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Folder of a build.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Folder of another build of the same images.")],
    out: Annotated[
        Path | None, typer.Option(help="Also write a page of the images that changed most.")
    ] = None,
    as_json: opt.AsJson = False,
) -> None:
    """How far the regions of two builds differ: agreement per level, counts, the images that changed most."""
    from hierarchy_builder.comparison import compare_builds, comparison_tables, write_comparison

    folders = BuildFolder(a).require(), BuildFolder(b).require()
    found = compare_builds(*folders)
    if out is not None:
        write_comparison(*folders, found, out)
    if as_json:
        print_json(found.as_json())
        return
    for title, rows in comparison_tables(*folders, found).items():
        print_table(title, rows)
    if out is not None:
        stdout.print(str(out), markup=False, highlight=False, soft_wrap=True)


@app.command()
def encoders(
    probe: Annotated[
        str | None, typer.Option(metavar="NAME", help="What this encoder sees of the probe pictures instead.")
    ] = None,
    weights: opt.Weights = None,
    as_json: opt.AsJson = False,
) -> None:
    """The encoders that can be named with --encoder."""
    from hierarchy_builder.encoders import list_encoders
    from hierarchy_builder.encoders.probe import probe_report

    if weights is not None and probe is None:
        raise UsageError("--weights are those of --probe NAME, which is not given")
    if probe is None:
        rows = [dataclasses.asdict(row) for row in list_encoders()]
    else:
        rows = [probe_report(probe, weights)]
    if as_json:
        print_json(rows)
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    stdout.print(table)


def main() -> NoReturn:
    """Run `hierarchy-builder` and leave with its exit code."""
    run(app)


def _stored(folder: BuildFolder, stage: str, fresh: bool) -> dict[str, Any]:
    """What a stage was asked for when it began, so that `DIR` alone takes it up again."""
    from hierarchy_builder.ledger import read_manifest

    return {} if fresh else read_manifest(folder)["stages"].get(stage, {}).get("request", {})


def _build_plan(arguments: Mapping[str, Any]) -> Any:
    """The configuration of every step from the arguments of `build`."""
    from hierarchy_builder.build import BuildPlan

    config, split = arguments["config"], arguments["split"]
    input_split = split if split and os.path.isdir(os.path.join(arguments["images"], split)) else None
    extract_flags = {**opt.of_config(ExtractConfig, arguments), "split": input_split}
    shard_flags = {**opt.of_config(ShardConfig, arguments), "images": arguments["with_images"]}
    return BuildPlan(
        extract=opt.resolve(ExtractConfig, "extract", extract_flags, config),
        hierarchy=opt.resolve_recipe(arguments, config),
        vocabulary=opt.resolve_vocabulary(arguments["vocabulary"], arguments["backend"], config),
        shard=opt.resolve(ShardConfig, "shard", shard_flags, config),
    )


def _session(workers: int | None, address: str | None, fresh: bool, quiet: bool, force: bool = False) -> Any:
    from hierarchy_builder.progress import Reporter
    from hierarchy_builder.session import Session
    from hierarchy_builder.workers import Workers

    if workers is not None and workers < 0:
        raise UsageError(f"--workers is {workers}, expected 0 or more")
    return Session(
        workers=Workers(count=workers, address=address),
        reporter=Reporter(quiet=quiet, console=stderr),
        fresh=fresh,
        force=force,
    )


def _publish(folder: BuildFolder, url: str | None, session: Any) -> list[Any]:
    from hierarchy_builder.remote import publish_to

    return [publish_to(folder, url, session.reporter)] if url else []


def _recut(folder: BuildFolder, arguments: Mapping[str, Any]) -> None:
    """Other levels of a build; what its parts are linked to is found anew, its shards are left as they are."""
    from hierarchy_builder import clustering as steps

    others = [*(name.name for name in dataclasses.fields(HierarchyRecipe)), "recipe", "vocabulary", "backend"]
    if given := [name for name in others if arguments[name] is not None]:
        raise UsageError(
            f"--recut keeps the stored trees and takes no --{given[0].replace('_', '-')}: "
            "cluster with --fresh for another recipe"
        )
    cuts = opt.numbers(arguments["recut"], "--recut") or []
    session = _session(arguments["workers"], arguments["address"], False, arguments["quiet"])
    with folder.locked():
        summaries = [steps.recut(folder, cuts, session)]
        if folder.vocabulary.exists():
            summaries.append(steps.link(folder, session))
        print_stages(summaries, arguments["as_json"])


def _report_quality(
    folder: BuildFolder,
    out: Path | None,
    samples: int,
    keys: Sequence[str] | None,
    masks: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    from hierarchy_builder.assessment import assess_build
    from hierarchy_builder.progress import Reporter
    from hierarchy_builder.quality_page import score_tables, summary, write_quality

    reporter = Reporter(quiet=quiet, console=stderr)
    found = assess_build(folder, limit=samples, keys=keys, masks=masks, reporter=reporter)
    page = write_quality(folder, found, out or folder.quality_page)
    if as_json:
        print_json(found.as_json())
        return
    print_table("Summary", [{"name": name, "value": value} for name, value in summary(found).items()])
    for title, rows in score_tables(found).items():
        print_table(title, rows)
    stdout.print(f"{folder.quality}\n{page}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
