"""The command `hierarchy-builder`: parse, call, print. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
import yaml
from rich.console import Console
from rich.table import Table

from hierarchy_builder import options as opt
from hierarchy_builder.artefacts import BuildFolder
from hierarchy_builder.config import (
    ExtractConfig,
    HierarchyRecipe,
    ShardConfig,
    to_mapping,
)
from hierarchy_builder.errors import BuilderError, InterruptedRunError, UsageError, VerificationError

app = typer.Typer(
    name="hierarchy-builder",
    help="Images → features → nested regions → webdataset shards of level canvases.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
)
stdout, stderr = Console(), Console(stderr=True)
CTRL_C = 130
"""The exit code click makes of KeyboardInterrupt."""


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
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Images → index.parquet and features.zarr."""
    flags = opt.of_config(ExtractConfig, locals())
    from hierarchy_builder import build as steps

    folder, source = (BuildFolder(out), images) if out else (BuildFolder(Path(images)).require(), None)
    stored = _stored(folder, "extract", fresh=False) if source is None else None
    resolved = opt.resolve(ExtractConfig, "extract", flags, config, stored)
    _show({"extract": to_mapping(resolved)}, quiet)
    session = _session(workers, address, fresh, quiet)
    with folder.locked():
        print_stages([steps.extract(folder, source, resolved, session, class_map=class_map)], as_json)


@app.command()
def cluster(
    folder: opt.Folder,
    cuts: opt.Cuts = None,
    spatial_weight: opt.SpatialWeight = None,
    seed: opt.Seed = None,
    vocabulary: opt.Vocabulary = None,
    backend: opt.Backend = None,
    workers: opt.WorkerCount = None,
    address: opt.Address = None,
    config: opt.ConfigFile = None,
    fresh: opt.Fresh = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """features.zarr → regions.zarr; with --vocabulary K also prototypes of the whole dataset."""
    flags = opt.of_config(HierarchyRecipe, locals())
    from hierarchy_builder import build as steps

    build_folder = BuildFolder(folder).require()
    flags["cuts"] = opt.numbers(cuts)
    recipe = opt.resolve(HierarchyRecipe, "hierarchy", flags, config, _stored(build_folder, "cluster", fresh))
    words = opt.resolve_vocabulary(vocabulary, backend, config, _stored(build_folder, "vocabulary", fresh))
    _show({"hierarchy": to_mapping(recipe), **({"vocabulary": to_mapping(words)} if words else {})}, quiet)
    session = _session(workers, address, fresh, quiet)
    with build_folder.locked():
        summaries = [steps.cluster(build_folder, recipe, session)]
        if words:
            summaries.append(steps.vocabulary(build_folder, words, session))
        print_stages(summaries, as_json)


@app.command()
def shard(
    folder: opt.Folder,
    split: opt.Split = None,
    samples_per_shard: opt.SamplesPerShard = None,
    shard_bytes: opt.ShardBytes = None,
    images: opt.WithImages = None,
    canvases: opt.WithCanvases = None,
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
    _show({"shard": to_mapping(resolved)}, quiet)
    session = _session(workers, address, fresh, quiet)
    with build_folder.locked():
        print_stages([steps.shard(build_folder, resolved, session)], as_json)


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
    cuts: opt.Cuts = None,
    spatial_weight: opt.SpatialWeight = None,
    seed: opt.Seed = None,
    vocabulary: opt.Vocabulary = None,
    backend: opt.Backend = None,
    samples_per_shard: opt.SamplesPerShard = None,
    shard_bytes: opt.ShardBytes = None,
    with_images: opt.WithImages = None,
    canvases: opt.WithCanvases = None,
    workers: opt.WorkerCount = None,
    address: opt.Address = None,
    config: opt.ConfigFile = None,
    fresh: opt.Fresh = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """extract, cluster and shard in one go; the same command resumes."""
    arguments = locals()
    from hierarchy_builder import build as steps

    folder = BuildFolder(out)
    input_split = split if split and os.path.isdir(os.path.join(images, split)) else None
    extract_flags = {**opt.of_config(ExtractConfig, arguments), "split": input_split}
    recipe_flags = {**opt.of_config(HierarchyRecipe, arguments), "cuts": opt.numbers(cuts)}
    shard_flags = {**opt.of_config(ShardConfig, arguments), "images": with_images}
    plan = steps.BuildPlan(
        extract=opt.resolve(ExtractConfig, "extract", extract_flags, config),
        hierarchy=opt.resolve(HierarchyRecipe, "hierarchy", recipe_flags, config),
        vocabulary=opt.resolve_vocabulary(vocabulary, backend, config),
        shard=opt.resolve(ShardConfig, "shard", shard_flags, config),
    )
    _show(plan.as_mapping(), quiet)
    session = _session(workers, address, fresh, quiet)
    with folder.locked():
        print_stages(steps.build(folder, images, plan, session, class_map=class_map), as_json)


@app.command()
def status(folder: opt.Folder, as_json: opt.AsJson = False) -> None:
    """What is done, stage by stage, read from the markers."""
    from hierarchy_builder.units import progress_of

    rows = progress_of(BuildFolder(folder).require())
    if as_json:
        _print_json(rows)
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


@app.command()
def verify(folder: opt.Folder, as_json: opt.AsJson = False) -> None:
    """Counts, keys, shapes, id ranges, nesting and sha256 of everything; exit code 4 when something is wrong."""
    from hierarchy_builder.verify import find_problems

    build_folder = BuildFolder(folder).require()
    problems = list(find_problems(build_folder))
    if as_json:
        _print_json({"problems": problems})
    else:
        for problem in problems:
            stdout.print(problem, markup=False, highlight=False, soft_wrap=True)
    if problems:
        raise VerificationError(
            f"{folder}: found {len(problems)} problems, expected none; remove the markers "
            f"{folder}/ledger/STAGE/NUMBER.json of what is damaged and repeat the command that made it, "
            "or start its stage over with --fresh"
        )
    if not as_json:
        stdout.print(f"{folder}: everything is in order")


@app.command()
def report(
    folder: opt.Folder,
    out: Annotated[Path | None, typer.Option(help="The page; by default DIR/report.html.")] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Images on the page, spread evenly over the classes.")
    ] = 48,
    keys: Annotated[str | None, typer.Option(help="Keys of the images to show, comma separated.")] = None,
) -> None:
    """A self-contained page: photo, region maps, PCA colours, decoded levels, with a slider coarse → fine."""
    from hierarchy_builder.inspection import write_report

    build_folder = BuildFolder(folder).require()
    page = write_report(
        build_folder, out or build_folder.report, limit=samples, keys=keys.split(",") if keys else None
    )
    stdout.print(str(page), markup=False, highlight=False, soft_wrap=True)


@app.command()
def encoders(as_json: opt.AsJson = False) -> None:
    """The encoders that can be named with --encoder."""
    from hierarchy_builder.encoders import list_encoders

    rows = [dataclasses.asdict(row) for row in list_encoders()]
    if as_json:
        _print_json(rows)
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    stdout.print(table)


def main() -> NoReturn:
    """Run `hierarchy-builder` and leave with its exit code."""
    run(app)


def run(command: typer.Typer) -> NoReturn:
    """Run a command line of this package and leave with the exit code of what happened."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        command()
    except BuilderError as error:
        stderr.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except OSError as error:
        stderr.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(BuilderError.exit_code)
    except SystemExit as end:
        if end.code == CTRL_C:
            stderr.print("stopped; the same command goes on from the last finished unit")
        raise
    sys.exit(0)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise InterruptedRunError("stopped by SIGTERM; the same command goes on from the last finished unit")


def _stored(folder: BuildFolder, stage: str, fresh: bool) -> dict[str, Any]:
    """What a stage was asked for when it began, so that `DIR` alone takes it up again."""
    from hierarchy_builder.ledger import read_manifest

    return {} if fresh else read_manifest(folder)["stages"].get(stage, {}).get("request", {})


def _session(workers: int | None, address: str | None, fresh: bool, quiet: bool) -> Any:
    from hierarchy_builder.build import Session
    from hierarchy_builder.progress import Reporter
    from hierarchy_builder.workers import Workers

    if workers is not None and workers < 0:
        raise UsageError(f"--workers is {workers}, expected 0 or more")
    return Session(
        workers=Workers(count=workers, address=address),
        reporter=Reporter(quiet=quiet, console=stderr),
        fresh=fresh,
    )


def _show(config: dict[str, Any], quiet: bool) -> None:
    if not quiet:
        stderr.print(
            yaml.safe_dump(config, sort_keys=False).rstrip(), markup=False, highlight=False, style="dim"
        )


def print_stages(summaries: Sequence[Any], as_json: bool) -> None:
    rows = [summary.as_row() for summary in summaries]
    if as_json:
        _print_json(rows)
        return
    table = Table("stage", "images", "new", "seconds", "images/s", "bytes", "notes")
    for row in rows:
        notes = ", ".join(f"{name} {value}" for name, value in row["notes"].items())
        rate = f"{row['images_per_second']:.1f}" if row["new_images"] else "-"
        table.add_row(
            row["stage"],
            f"{row['images']:,}",
            f"{row['new_images']:,}",
            f"{row['seconds']:.1f}",
            rate,
            f"{row['num_bytes']:,}",
            notes,
        )
    stdout.print(table)


def _print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
