"""The command `hierarchy-builder`: parse, call, print. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import typer

from hierarchy_builder.cli import looking
from hierarchy_builder.cli import options as opt
from hierarchy_builder.config import ExtractConfig, ShardConfig
from hierarchy_builder.errors import UsageError
from hierarchy_builder.fields import to_mapping
from hierarchy_builder.files.paths import a_folder
from hierarchy_builder.files.whole import size_on_disk
from hierarchy_builder.flags import (
    FOLDER,
    OUTPUT,
    PLACE,
    argument,
    flags,
    grouped,
    new_app,
    option,
    switch,
    takes,
)
from hierarchy_builder.machine.doctor import doctor
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.terminal import (
    counted,
    print_json,
    print_stages,
    print_table,
    run,
    say,
    say_next,
    show_config,
    stdout,
)

app = new_app(
    "hierarchy-builder", "Images → features → nested regions → webdataset shards of level canvases."
)
WHOLE, STAGES, CHECKS = "From photos to shards", "One stage at a time", "Look, check and share"


@app.command(rich_help_panel=STAGES)
@takes(
    images=argument("The images, or DIR of a build to continue.", **PLACE | {"metavar": "IMAGES"}),
    out=option("Folder or URL of a new build; leave it out where IMAGES is DIR.", **FOLDER),
    **(opt.ENCODING | opt.RUN | opt.ONCE | opt.TRUST | OUTPUT),
)
def extract(images: str, out: Path | None, **given: Any) -> None:
    """Encode images: images → index.parquet and features.zarr."""
    from hierarchy_builder.build import pipeline as steps
    from hierarchy_builder.encoders import check_stored_encoder
    from hierarchy_builder.store.units import refuse_fused

    folder, stored = BuildFolder(out or a_folder(images)), dict[str, Any]()
    if out is None:
        refuse_fused(folder.require(), "extract")
        stored = _stored(folder, "extract")
    resolved = opt.resolve(ExtractConfig, "extract", given, stored)
    if stored and given["encoder"] is None:
        check_stored_encoder(resolved.encoder, folder.root, trusted=given["trust_encoder"])
    show_config({"extract": to_mapping(resolved)}, given["quiet"])
    once = {name: given[name] for name in ("class_map", "retry_failed", "accept_new_files")}
    with folder.locked(say):
        _confirm_fresh(folder, "extract", given)
        source = images if out else None
        summary = steps.extract(folder, source, resolved, _session(given), **once)
        print_stages([summary], given["as_json"])
    say_next(f"features lie in {folder.features}", [(PROGRAM, "cluster", folder.root)], given["quiet"])


@app.command(rich_help_panel=STAGES)
@takes(
    folder=opt.FOLDER,
    **opt.RECIPE,
    **grouped(
        "Regions",
        recut=option(
            "Cut the stored merge trees anew, as with --cuts: 0.7,0.5,0.3 or 8,16; reads no features."
        ),
    ),
    **(opt.VOCABULARY | opt.RUN | OUTPUT),
)
def cluster(folder: Path, recut: str | None, **given: Any) -> None:
    """Cluster features into nested regions: features.zarr → regions.zarr; with --vocabulary also prototypes."""
    from hierarchy_builder.build import pipeline as steps

    build_folder, fresh = BuildFolder(folder).require(), given["fresh"]
    if recut is not None:
        _recut(build_folder, recut, given)
        return
    recipe = opt.resolve_recipe(given, _stored(build_folder, "cluster", fresh))
    vocabulary = opt.resolve_vocabulary(given, _stored(build_folder, "vocabulary", fresh))
    sections = {"hierarchy": recipe} | ({"vocabulary": vocabulary} if vocabulary else {})
    show_config({name: to_mapping(section) for name, section in sections.items()}, given["quiet"])
    session = _session(given)
    with build_folder.locked(say):
        _confirm_fresh(build_folder, "vocabulary" if vocabulary else "cluster", given)
        summaries = [steps.vocabulary(build_folder, vocabulary, session)] if vocabulary else []
        summaries.append(steps.cluster(build_folder, recipe, session))
        if vocabulary:
            summaries.append(steps.link(build_folder, session))
        print_stages(summaries, given["as_json"])
    say_next(f"regions lie in {build_folder.regions}", [(PROGRAM, "shard", folder)], given["quiet"])


@app.command(rich_help_panel=STAGES)
@takes(
    folder=opt.FOLDER,
    **grouped("Shards", **flags(ShardConfig, "split")),
    **(opt.SHARDS | opt.PUBLISH | opt.RUN | OUTPUT),
)
def shard(folder: Path, publish: str | None, **given: Any) -> None:
    """Write features and regions as webdataset shards."""
    _check_url(publish)
    from hierarchy_builder.build import pipeline as steps

    build_folder = BuildFolder(folder).require()
    stored = _stored(build_folder, "shard", given["fresh"])
    if given["images"] is False:
        stored.pop("image_px", None)  # the size of stored pictures goes with them
    resolved = opt.resolve(ShardConfig, "shard", given, stored)
    show_config({"shard": to_mapping(resolved)}, given["quiet"])
    session = _session(given)
    with build_folder.locked(say):
        _confirm_fresh(build_folder, "shard", given)
        summaries = [steps.shard(build_folder, resolved, session)]
        print_stages(summaries + _publish(build_folder, publish, given["quiet"]), given["as_json"])
    _say_after_shards(build_folder, given["quiet"], has_stores=True)


OF_BUILD: dict[str, Any] = (
    opt.BUILD
    | opt.ENCODING
    | grouped(
        "Shards",
        split=option("First part of the shard names; IMAGES/SPLIT is taken where it exists. Default: train."),
    )
    | opt.RECIPE
    | opt.VOCABULARY
    | opt.SHARDS
    | grouped(
        "Workers",
        gpus_per_worker=option(
            "GPUs that each worker reserves while it encodes, for example 0.5.", kind=float
        ),
        encoding_workers=option(
            "Processes that only encode, fed by the workers; with 0 every worker encodes. Default: two for each GPU "
            "of a Ray cluster that also has nodes without one, and else 0.",
            kind=int,
        ),
    )
    | grouped(
        "Shards",
        fused=switch(
            "Build in one pass, without storing features and regions; the shards are the same.", "--fused"
        ),
    )
    | opt.PUBLISH
    | opt.RUN
    | opt.ONCE
    | OUTPUT
)
"""The parameters of `build`, which `plan` takes as well."""


@app.command(rich_help_panel=WHOLE)
@takes(**OF_BUILD)
def build(source: str, out: Path, publish: str | None, **given: Any) -> None:
    """Turn photographs into shards: extract, cluster and shard in one; the same command resumes."""
    from hierarchy_builder.build import pipeline as steps

    _check_url(publish)
    folder, plan = BuildFolder(out), _build_plan(source, given)
    show_config(plan.as_mapping(), given["quiet"])
    session = _session(given)
    with folder.locked(say):
        _confirm_fresh(folder, "extract", given)
        once = {name: given[name] for name in ("class_map", "retry_failed", "accept_new_files", "fused")}
        summaries = steps.build(folder, source, plan, session, **once)
        print_stages(summaries + _publish(folder, publish, given["quiet"]), given["as_json"])
    _say_after_shards(folder, given["quiet"], has_stores=not given["fused"])


@app.command(rich_help_panel=WHOLE)
@takes(**{name: OF_BUILD[name] for name in OF_BUILD if name not in ("retry_failed", "publish", "yes")})
def plan(source: str, out: Path, **given: Any) -> None:
    """Estimate what build would do with the same options: images, bytes, seconds, shards; tries at most 128 images."""
    from hierarchy_builder.build.plan import make_plan, plan_tables

    folder, config = BuildFolder(out), _build_plan(source, given)
    show_config(config.as_mapping(), given["quiet"])
    once = {name: given[name] for name in ("class_map", "fused", "accept_new_files")}
    found = make_plan(folder, source, config, _session(given), **once)
    if given["as_json"]:
        print_json(found.as_json())
    else:
        for text in found.warnings:
            say(f"warning: {text}")
        for title, rows in plan_tables(found).items():
            print_table(title, rows)
    found.check(folder, force=given["force"])
    words = _words()
    if "plan" in words:
        at = words.index("plan")
        say_next(
            "",
            [[*words[:at], "build", *(word for word in words[at + 1 :] if word != "--json")]],
            given["quiet"],
        )


@app.command("publish", rich_help_panel=CHECKS)
@takes(
    folder=opt.FOLDER,
    url=argument(
        "URL to copy to, as fsspec names it, for example s3://bucket/set.", **PLACE | {"metavar": "URL"}
    ),
    **OUTPUT,
)
def publish_shards(folder: Path, url: str, as_json: bool, quiet: bool) -> None:
    """Upload finished shards to another file system; the same command uploads what is missing."""
    build_folder = BuildFolder(folder).require()
    with build_folder.locked(say):
        print_stages(_publish(build_folder, url, quiet), as_json)
    say_next(f"shards lie in {url}", [("trainer", "train", url, "--out", "RUN")], quiet)


@app.command(rich_help_panel=CHECKS)
@takes(folder=opt.FOLDER, **(opt.ENCODER_AT | opt.WORKERS | opt.TRUST | OUTPUT))
def repair(folder: Path, **given: Any) -> None:
    """Rebuild what verify finds damaged, and only that; exit code 4 if something could not be repaired."""
    from hierarchy_builder.verify.repair import repair as run_repair

    build_folder = BuildFolder(folder).require(damaged=True)
    with build_folder.locked(say):
        encoder_at = {name: given[name] for name in opt.ENCODER_AT if given[name] is not None}
        repaired = run_repair(build_folder, dataclasses.replace(_session(given), encoder_at=encoder_at))
    if given["as_json"]:
        print_json({"repaired": [dataclasses.asdict(damage) for damage in repaired]})
    else:
        stdout.print(f"{folder}: {counted(len(repaired), 'problem')} repaired")
    say_next("", [(PROGRAM, "verify", folder)], given["quiet"])


for verb in (looking.status, looking.verify, looking.report, looking.compare, looking.encoders):
    app.command(rich_help_panel=CHECKS)(verb)
app.command(rich_help_panel=CHECKS)(doctor)
# in the order of the help: Typer prints the groups as their first verbs come
app.registered_commands.sort(key=lambda verb: (WHOLE, STAGES, CHECKS).index(str(verb.rich_help_panel)))


PROGRAM = "hierarchy-builder"


def main() -> NoReturn:
    """Run `hierarchy-builder` and leave with its exit code."""
    run(app, continues=True)


def _stored(folder: BuildFolder, stage: str, fresh: bool = False) -> dict[str, Any]:
    """The request that a stage began with, so that `DIR` alone continues it."""
    from hierarchy_builder.store.ledger import read_manifest

    return {} if fresh else read_manifest(folder)["stages"].get(stage, {}).get("request", {})


def _build_plan(source: str, given: Mapping[str, Any]) -> Any:
    """The configuration of every step from the options of `build`."""
    from hierarchy_builder.build.pipeline import BuildPlan

    split = given["split"] if os.path.isdir(os.path.join(source, given["split"] or "")) else None
    return BuildPlan(
        extract=opt.resolve(ExtractConfig, "extract", {**given, "split": split}),
        hierarchy=opt.resolve_recipe(given),
        vocabulary=opt.resolve_vocabulary(given),
        shard=opt.resolve(ShardConfig, "shard", given),
    )


def _session(given: Mapping[str, Any]) -> Any:
    """The session that the options of a command ask for; what it does not take has its default."""
    from hierarchy_builder.build.session import Session
    from hierarchy_builder.build.workers import Workers
    from hierarchy_builder.progress import Reporter

    return Session(
        workers=Workers(
            count=given["workers"],
            address=given.get("address"),
            gpus_per_worker=given.get("gpus_per_worker"),
            encoding=given.get("encoding_workers"),
        ),
        reporter=Reporter(quiet=given["quiet"]),
        **{name: given.get(name, False) for name in ("fresh", "force", "trust_encoder")},
    )


def _confirm_fresh(folder: BuildFolder, stage: str, given: Mapping[str, Any]) -> None:
    """Say on stderr what --fresh is about to remove; finished shards also need --yes, or a yes on the terminal."""
    from hierarchy_builder.store.ledger import removed_by_fresh
    from hierarchy_builder.store.shards import count_samples

    places = removed_by_fresh(folder, stage) if given["fresh"] else []
    if not places:
        return
    samples = count_samples(folder.shards) if folder.shards in places else 0
    more = {folder.shards: f", {counted(samples, 'sample')}"} if samples else {}
    sizes = (
        f"{place.relative_to(folder.root)} ({size_on_disk(place):,} bytes{more.get(place, '')})"
        for place in places
    )
    say(f"--fresh removes from {folder.root}: {', '.join(sizes)}")
    if not samples or given["yes"]:
        return
    if sys.stdin.isatty() and typer.confirm("Remove the finished shards?", err=True):
        return
    raise UsageError(
        f"--fresh would remove {counted(samples, 'finished sample')}; to remove them: "
        f"{shlex.join([*_words(), '--yes'])}"
    )


def _words() -> list[str]:
    """The words of this command as they can be typed again."""
    is_module = sys.argv[0].endswith(".py")
    return list(sys.orig_argv) if is_module else [Path(sys.argv[0]).name, *sys.argv[1:]]


def _say_after_shards(folder: BuildFolder, quiet: bool, *, has_stores: bool) -> None:
    """Where finished shards lie, and what to do with them."""
    look = [(PROGRAM, "report", folder.root)] if has_stores else []
    root = folder.root if folder.root.name else folder.root.resolve()  # of "." the name is empty
    train = ("trainer", "train", folder.root, "--out", f"{root}-run")
    say_next(f"shards lie in {folder.shards}", [*look, train], quiet)


def _check_url(url: str | None) -> None:
    """Refuse a place for the shards that nobody could write to, before they are made."""
    from hierarchy_builder.build.publish import open_url

    if url is not None:
        open_url(url)


def _publish(folder: BuildFolder, url: str | None, quiet: bool) -> list[Any]:
    from hierarchy_builder.build.publish import publish_to
    from hierarchy_builder.progress import Reporter

    return [publish_to(folder, url, Reporter(quiet=quiet))] if url else []


def _recut(folder: BuildFolder, heights: str, given: Mapping[str, Any]) -> None:
    """Cut the trees at other heights and link the new parts to prototypes; the shards stay as they are."""
    from hierarchy_builder.build import clustering as steps

    if others := [name for name in (*opt.RECIPE, *opt.VOCABULARY) if given[name] is not None]:
        raise UsageError(
            f"--recut keeps the stored trees and takes no --{others[0].replace('_', '-')}: "
            "cluster with --fresh for another recipe"
        )
    cuts, session = opt.numbers(heights, "--recut") or [], _session({**given, "fresh": False})
    with folder.locked(say):
        summaries = [steps.recut(folder, cuts, session)]
        if folder.vocabulary.exists():
            summaries.append(steps.link(folder, session))
        print_stages(summaries, given["as_json"])
