"""Verbs that look at builds and change nothing: `status`, `verify`, `report`, `compare`, `encoders`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hierarchy_builder.cli import options as opt
from hierarchy_builder.config import ExtractConfig
from hierarchy_builder.errors import BuilderError, UsageError, UserError, VerificationError
from hierarchy_builder.files.paths import a_folder, may_hold_builds
from hierarchy_builder.files.remote import keeping
from hierarchy_builder.files.whole import readable_json, target_of
from hierarchy_builder.flags import FOLDER, OUTPUT, PATH, argument, flags, option, switch, takes
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.terminal import counted, print_cells, print_json, print_table, stdout


@takes(folders=opt.FOLDERS, **OUTPUT)
def status(folders: list[Path], as_json: bool, quiet: bool) -> None:
    """Show what is done, stage by stage, and the progress of the run that works on the build now."""
    from hierarchy_builder.store.ledger import recorded_stages
    from hierarchy_builder.store.units import progress_of, running_stage

    found, cells, notes = list[dict[str, Any]](), list[list[str]](), list[str]()
    for folder in folders:
        build_folder = BuildFolder(folder).require()
        with keeping():
            rows = progress_of(build_folder)
        running = running_stage(build_folder)
        left_out = recorded_stages(build_folder).get("extract", {}).get("left_out", [])
        of_stage = running["stage"] if running else None
        named = {"build": str(folder)} if len(folders) > 1 else {}
        for row in rows:
            found.append(
                {"build": str(folder), **row, "running": running if row["stage"] == of_stage else None}
            )
            if row["stage"] in ("extract", "fuse"):
                found[-1]["left_out"] = left_out
            units, images = f"{row['units_done']}/{row['units']}", f"{row['images']:,}"
            seconds, size = f"{row['seconds']:.1f}", f"{row['bytes']:,}"
            cells.append([*named.values(), row["stage"], units, images, seconds, size, row["state"]])
        start = f"{folder}: " if named else ""
        notes += [start + text for text in (*left_out, *([_of_running(running)] if running else []))]
    if as_json:
        print_json(found)
        return
    titles = ("stage", "units", "images", "unit seconds", "bytes", "state")
    print_cells(titles if len(folders) == 1 else ("build", *titles), cells)
    for text in notes:
        stdout.print(text, soft_wrap=True)


def _of_running(running: Mapping[str, Any]) -> str:
    """A line about the stage that runs now."""
    from hierarchy_builder.progress import as_duration

    left = running["remaining_s"]
    return (
        f"running: {running['stage']}, {running['images_done']}/{running['images']} images, "
        f"{running['images_per_second']:.1f} images/s, {running['failed']} could not be used, "
        f"{'?' if left is None else as_duration(left)} left"
    )


@takes(
    places=opt.BUILDS_AND_SETS,
    quick=switch(
        "Only check that every file is there with its size, and that manifest, markers and index match their checksums."
    ),
    **OUTPUT,
)
def verify(places: list[str], quick: bool, as_json: bool, quiet: bool) -> None:
    """Read every file and compare it with what was written; exit code 4 if something is damaged."""
    looked = [_verified(place, quick) for place in places]
    errors = [error for _, error in looked if error is not None]
    if len(places) == 1 and errors and not looked[0][0]:
        raise errors[0]  # it cannot be verified
    if as_json:
        rows = [
            {"problems": problems, **({"error": str(error)} if error and not problems else {})}
            for problems, error in looked
        ]
        _print_of_builds(places, rows, len(places) == 1)
    else:
        for place, (problems, error) in zip(places, looked, strict=True):
            for line in problems if error else [f"{place}: everything is {'there' if quick else 'in order'}"]:
                stdout.print(line, soft_wrap=True)
    if errors:
        worst = max(errors, key=lambda error: error.exit_code)
        raise type(worst)("\n".join(map(str, errors)))


def _verified(place: str, quick: bool) -> tuple[list[str], UserError | None]:
    """What is damaged in a build or shard set, and the error about that, or about what keeps it from being verified."""
    from hierarchy_builder.verify.checks import find_damage
    from hierarchy_builder.verify.sets import find_set_problems, is_set

    try:
        build_folder = BuildFolder(a_folder(place)) if may_hold_builds(place) else None
        if build_folder is None or (not build_folder.is_there() and is_set(place)):
            problems = list(find_set_problems(place, quick=quick))
            return problems, VerificationError(_count_of(place, problems)) if problems else None
        _refuse_running(build_folder)
        with keeping():
            found = list(find_damage(build_folder, quick=quick))
        if found:
            _refuse_running(build_folder)  # one that began meanwhile
    except UserError as error:
        return [], error
    if not found:
        return [], None
    advice = f"run `hierarchy-builder repair {place}`, or start what is damaged over with --fresh"
    if all(damage.is_stale for damage in found):
        advice = "nothing is damaged; do what is said above"
    return [damage.text for damage in found], VerificationError(f"{_count_of(place, found)}; {advice}")


def _count_of(place: str, problems: Sequence[Any]) -> str:
    return f"{place}: found {counted(len(problems), 'problem')}, expected none"


@takes(
    folders=opt.FOLDERS,
    out=option("The page; by default DIR/report.html, quality.html or vocabulary.html.", **PATH),
    samples=option(
        "Images, spread evenly over the classes: 48 on the page, with --quality 200 scored.", kind=int, min=1
    ),
    keys=option("Keys of the images to show instead, separated by commas."),
    quality=switch("Score the regions and their stability; also writes DIR/quality.json.", "--quality"),
    masks=option("With --quality: folder of label maps <stem>_<k>.png to compare with.", **PATH),
    vocabulary=switch("Show the prototypes, each by the parts nearest to it, instead.", "--vocabulary"),
    prototypes=option("With --vocabulary: prototypes on the page.", kind=int, default=64, min=1),
    **opt.TRUST,
    **OUTPUT,
)
def report(folders: list[Path], out: Path | None, quality: bool, vocabulary: bool, **given: Any) -> None:
    """Write a self-contained page: photographs, region maps, colours of features, decoded levels, a slider."""
    builds = [BuildFolder(folder).require() for folder in folders]
    if quality and vocabulary:
        raise UsageError("--quality and --vocabulary are two pages: ask for one at a time")
    if given["masks"] is not None and not quality:
        raise UsageError("--masks belongs to --quality, which is not given")
    if out is not None:
        if len(builds) > 1:
            raise UsageError("--out is one page, and each build gets its own: leave it out")
        target_of(out)  # refused before anything is read
    kind = "quality_page" if quality else "vocabulary_page" if vocabulary else "report"
    for folder in builds:
        _refuse_foreign(folder, None if out else getattr(folder, kind), quality)
    chosen = _keys_by_build(builds, given["keys"].split(",") if given["keys"] else None)
    rows = list[dict[str, Any]]()
    for folder, keys in chosen.items():
        page = out or getattr(folder, kind)
        rows.append({"page": str(page)})
        if quality:
            rows[-1] = _score(folder, keys, page, "" if len(builds) == 1 else f" of {folder.root}", given)
        elif vocabulary:
            from hierarchy_builder.quality.vocabulary_page import write_vocabulary_page

            write_vocabulary_page(folder, page, limit=given["prototypes"])
        else:
            from hierarchy_builder.quality.report import write_report

            write_report(folder, page, limit=given["samples"] or 48, keys=keys)
        if not given["as_json"]:
            stdout.print(str(page), soft_wrap=True)
    if given["as_json"]:
        _print_of_builds((folder.root for folder in chosen), rows, len(builds) == 1)


@takes(
    a=argument("Folder or URL of a build.", **FOLDER | {"metavar": "A"}),
    b=argument("Folder or URL of another build of the same images.", **FOLDER | {"metavar": "B"}),
    out=option("Also write a page of the images that changed most.", **PATH),
    **OUTPUT,
)
def compare(a: Path, b: Path, out: Path | None, as_json: bool, quiet: bool) -> None:
    """Compare the regions of two builds: agreement per level, counts, and the images that differ most."""
    from hierarchy_builder.quality.comparison import compare_builds, comparison_tables, write_comparison

    builds = BuildFolder(a).require(), BuildFolder(b).require()
    if out is not None:
        target_of(out)  # refused before anything is read
    found = compare_builds(*builds)
    if out is not None:
        write_comparison(found, out)
    if as_json:
        print_json(found.as_json())
        return
    for title, rows in comparison_tables(found).items():
        print_table(title, rows)
    if out is not None:
        stdout.print(str(out), soft_wrap=True)


@takes(
    probe=option(
        "Print instead the numbers by which builds recognise this encoder, and whether they agree here.",
        metavar="NAME",
    ),
    **flags(ExtractConfig, "weights"),
    **OUTPUT,
)
def encoders(probe: str | None, weights: str | None, as_json: bool, quiet: bool) -> None:
    """List the encoders that --encoder takes."""
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
    print_cells(rows[0], [["" if value is None else str(value) for value in row.values()] for row in rows])


def _print_of_builds(folders: Iterable[Path | str], rows: Sequence[Mapping[str, Any]], is_one: bool) -> None:
    """Print JSON: where one build was named, what is told of it, and else a list in which `build` names each."""
    named = [{"build": str(folder), **row} for folder, row in zip(folders, rows, strict=True)]
    print_json(rows[0] if is_one else named)


def _keys_by_build(
    builds: Sequence[BuildFolder], keys: Sequence[str] | None
) -> dict[BuildFolder, Sequence[str] | None]:
    """The builds that have any of the keys, each with those it has. Raises UsageError for a key that none has."""
    if keys is None or len(builds) == 1:
        return dict.fromkeys(builds, keys)
    from hierarchy_builder.quality.report import rows_by_key

    known = {folder: rows_by_key(folder) for folder in builds}
    if missing := [key for key in keys if not any(key in each for each in known.values())]:
        raise UsageError(
            f"none of the {len(builds)} builds has a usable image {', '.join(missing)}; {builds[0].index.name} of each "
            "lists its keys"
        )
    some = {folder: [key for key in keys if key in each] for folder, each in known.items()}
    return {folder: found for folder, found in some.items() if found}


def _refuse_running(folder: BuildFolder) -> None:
    """Raise BuilderError while another process writes the build: what is not there yet is no damage."""
    if folder.is_locked():
        raise BuilderError(
            f"{folder.root} is being written by another process: verify it when that has ended; "
            f"`hierarchy-builder status {folder.root}` shows how far it is"
        )


def _refuse_foreign(folder: BuildFolder, page: Path | None, quality: bool) -> None:
    """Raise UsageError where a page, or the scores beside it, would replace a file that no report wrote."""
    from hierarchy_builder.canvases.gallery import is_page

    what = "is there, and no report of this program wrote it: move it away"
    if page is not None and page.exists() and not is_page(page):
        raise UsageError(f"{page} {what}, or choose another file with --out")
    if quality and folder.quality.exists() and "num_sampled" not in readable_json(folder.quality):
        raise UsageError(f"{folder.quality} {what}")


def _score(
    folder: BuildFolder, keys: Sequence[str] | None, page: Path, of_build: str, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Score a build, write its page, print the tables unless JSON is asked for, and return what quality.json holds."""
    from hierarchy_builder.progress import Reporter
    from hierarchy_builder.quality.assessment import assess_build
    from hierarchy_builder.quality.scores_page import score_tables, summary, write_quality

    found = assess_build(
        folder,
        keys=keys,
        limit=given["samples"] or 200,
        masks=given["masks"],
        reporter=Reporter(quiet=given["quiet"]),
        trust_encoder=given["trust_encoder"],
    )
    write_quality(folder, found, page)
    if not given["as_json"]:
        summed = [{"name": name, "value": value} for name, value in summary(found).items()]
        for title, table in {"Summary": summed, **score_tables(found)}.items():
            print_table(title + of_build, table)
        stdout.print(str(folder.quality), soft_wrap=True)
    return found.as_json()
