"""The command `hierarchy-builder`: parse, call, print. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import dataclasses
import inspect
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from hierarchy_builder.cli import looking as view_commands
from hierarchy_builder.cli import options as opt
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig
from hierarchy_builder.errors import UsageError
from hierarchy_builder.fields import to_mapping
from hierarchy_builder.files import size_on_disk
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.terminal import (
    counted,
    print_json,
    print_stages,
    print_table,
    run,
    show_config,
    stderr,
    stdout,
)

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
    out: Annotated[Path | None, typer.Option(**opt.PATH, help="Folder of the build.")] = None,
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
    yes: opt.Yes = False,
    retry_failed: opt.RetryFailed = False,
    accept_new_files: opt.AcceptNew = False,
    force: opt.Force = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Encode images: images → index.parquet and features.zarr."""
    flags = opt.of_config(ExtractConfig, locals())
    from hierarchy_builder.build import pipeline as steps

    folder, source = (BuildFolder(out), images) if out else (BuildFolder(Path(images)).require(), None)
    stored = _stored(folder, "extract", fresh=False) if source is None else None
    resolved = opt.resolve(ExtractConfig, "extract", flags, config, stored)
    show_config({"extract": to_mapping(resolved)}, quiet)
    session = _session(workers, address, fresh, quiet, force)
    with folder.locked():
        _confirm_fresh(folder, "extract", fresh, yes)
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
    yes: opt.Yes = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Cluster features into nested regions: features.zarr → regions.zarr; with --vocabulary also prototypes."""
    arguments = locals()
    from hierarchy_builder.build import pipeline as steps

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
        _confirm_fresh(build_folder, "vocabulary" if words else "cluster", fresh, yes)
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
    image_px: opt.ImagePx = None,
    canvases: opt.WithCanvases = None,
    covariance: opt.WithCovariance = None,
    publish: opt.PublishTo = None,
    workers: opt.WorkerCount = None,
    address: opt.Address = None,
    config: opt.ConfigFile = None,
    fresh: opt.Fresh = False,
    yes: opt.Yes = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write features and regions as webdataset shards."""
    flags = opt.of_config(ShardConfig, locals())
    _check_url(publish)
    from hierarchy_builder.build import pipeline as steps

    build_folder = BuildFolder(folder).require()
    resolved = opt.resolve_shard(flags, config, _stored(build_folder, "shard", fresh))
    show_config({"shard": to_mapping(resolved)}, quiet)
    session = _session(workers, address, fresh, quiet)
    with build_folder.locked():
        _confirm_fresh(build_folder, "shard", fresh, yes)
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
    image_px: opt.ImagePx = None,
    canvases: opt.WithCanvases = None,
    covariance: opt.WithCovariance = None,
    workers: opt.WorkerCount = None,
    address: opt.Address = None,
    gpus_per_worker: opt.GpusPerWorker = None,
    config: opt.ConfigFile = None,
    fused: opt.Fused = False,
    publish: opt.PublishTo = None,
    fresh: opt.Fresh = False,
    yes: opt.Yes = False,
    retry_failed: opt.RetryFailed = False,
    accept_new_files: opt.AcceptNew = False,
    force: opt.Force = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Run extract, cluster and shard; the same command resumes."""
    arguments = locals()
    from hierarchy_builder.build import pipeline as steps

    _check_url(publish)
    folder, plan = BuildFolder(out), _build_plan(arguments)
    show_config(plan.as_mapping(), quiet)
    session = _session(workers, address, fresh, quiet, force, gpus_per_worker)
    with folder.locked():
        _confirm_fresh(folder, "extract", fresh, yes)
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
@_takes_arguments_of(build, without=["retry_failed", "publish", "yes"])
def plan(**arguments: Any) -> None:
    """Estimate what build would do with the same options: images, bytes, seconds, shards; tries at most 128 images."""
    from hierarchy_builder.build.plan import make_plan, plan_tables

    folder, quiet = BuildFolder(arguments["out"]), arguments["quiet"]
    config = _build_plan(arguments)
    show_config(config.as_mapping(), quiet)
    named = ("workers", "address", "fresh", "quiet", "force", "gpus_per_worker")
    session = _session(*(arguments[name] for name in named))
    once = {name: arguments[name] for name in ("class_map", "fused", "accept_new_files")}
    found = make_plan(folder, arguments["images"], config, session, **once)
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
    """Upload finished shards to another file system; the same command uploads what is missing."""
    build_folder = BuildFolder(folder).require()
    with build_folder.locked():
        print_stages(_publish(build_folder, url, _session(0, None, False, quiet)), as_json)


@app.command()
def repair(
    folder: opt.Folder,
    workers: opt.WorkerCount = None,
    address: opt.Address = None,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Rebuild what verify finds damaged, and only that; exit code 4 if something could not be repaired."""
    from hierarchy_builder.verify.repair import repair as mend

    build_folder = BuildFolder(folder).require(damaged=True)
    session = _session(workers, address, False, quiet)
    with build_folder.locked():
        mended = mend(build_folder, session)
    if as_json:
        print_json({"mended": [dataclasses.asdict(damage) for damage in mended]})
    else:
        stdout.print(f"{folder}: {counted(len(mended), 'problem')} mended", highlight=False)


for verb in (
    view_commands.status,
    view_commands.verify,
    view_commands.report,
    view_commands.compare,
    view_commands.encoders,
):
    app.command()(verb)


def main() -> NoReturn:
    """Run `hierarchy-builder` and leave with its exit code."""
    run(app, continues=True)


def _stored(folder: BuildFolder, stage: str, fresh: bool) -> dict[str, Any]:
    """What a stage was asked for when it began, so that `DIR` alone takes it up again."""
    from hierarchy_builder.store.ledger import read_manifest

    return {} if fresh else read_manifest(folder)["stages"].get(stage, {}).get("request", {})


def _build_plan(arguments: Mapping[str, Any]) -> Any:
    """The configuration of every step from the arguments of `build`."""
    from hierarchy_builder.build.pipeline import BuildPlan

    config, split = arguments["config"], arguments["split"]
    input_split = split if split and os.path.isdir(os.path.join(arguments["images"], split)) else None
    extract_flags = {**opt.of_config(ExtractConfig, arguments), "split": input_split}
    shard_flags = {**opt.of_config(ShardConfig, arguments), "images": arguments["with_images"]}
    return BuildPlan(
        extract=opt.resolve(ExtractConfig, "extract", extract_flags, config),
        hierarchy=opt.resolve_recipe(arguments, config),
        vocabulary=opt.resolve_vocabulary(arguments["vocabulary"], arguments["backend"], config),
        shard=opt.resolve_shard(shard_flags, config),
    )


def _session(
    workers: int | None,
    address: str | None,
    fresh: bool,
    quiet: bool,
    force: bool = False,
    gpus_per_worker: float | None = None,
) -> Any:
    from hierarchy_builder.build.session import Session
    from hierarchy_builder.build.workers import Workers
    from hierarchy_builder.progress import Reporter

    if workers is not None and workers < 0:
        raise UsageError(f"--workers is {workers}, expected 0 or more")
    return Session(
        workers=Workers(count=workers, address=address, gpus_per_worker=gpus_per_worker),
        reporter=Reporter(quiet=quiet, console=stderr),
        fresh=fresh,
        force=force,
    )


def _confirm_fresh(folder: BuildFolder, stage: str, fresh: bool, yes: bool) -> None:
    """Say on stderr what --fresh is about to remove; finished shards also need --yes, or a yes on the terminal."""
    from hierarchy_builder.store.ledger import removed_by_fresh
    from hierarchy_builder.store.shards import count_samples

    places = removed_by_fresh(folder, stage) if fresh else []
    if not places:
        return
    samples = count_samples(folder.shards) if folder.shards in places else 0
    sizes = [f"{place.relative_to(folder.root)} ({size_on_disk(place):,} bytes)" for place in places]
    if samples:
        shards = f"{folder.shards.name} ({size_on_disk(folder.shards):,} bytes, {counted(samples, 'sample')})"
        sizes[places.index(folder.shards)] = shards
    stderr.print(f"--fresh removes from {folder.root}: {', '.join(sizes)}", highlight=False, soft_wrap=True)
    if not samples or yes or (sys.stdin.isatty() and typer.confirm("Remove the finished shards?", err=True)):
        return
    is_module = sys.argv[0].endswith(".py")
    words = sys.orig_argv if is_module else [Path(sys.argv[0]).name, *sys.argv[1:]]
    raise UsageError(
        f"--fresh would remove {counted(samples, 'finished sample')}; to remove them: "
        f"{shlex.join([*words, '--yes'])}"
    )


def _check_url(url: str | None) -> None:
    """Refuse a place for the shards that nobody could write to, before they are made."""
    from hierarchy_builder.build.publish import open_url

    if url is not None:
        open_url(url)


def _publish(folder: BuildFolder, url: str | None, session: Any) -> list[Any]:
    from hierarchy_builder.build.publish import publish_to

    return [publish_to(folder, url, session.reporter)] if url else []


def _recut(folder: BuildFolder, arguments: Mapping[str, Any]) -> None:
    """Other levels of a build; what its parts are linked to is found anew, its shards are left as they are."""
    from hierarchy_builder.build import clustering as steps

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


if __name__ == "__main__":
    main()
