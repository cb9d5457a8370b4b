"""The step from images to features: list, settle what is open, check the encoder, do what is missing, count skips."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from hierarchy_builder.build.additions import append, in_row_order, parts_of, same_blocks
from hierarchy_builder.build.changes import reopen_failed
from hierarchy_builder.build.session import Session, StageSummary, do_units
from hierarchy_builder.build.space import check_space, extract_bytes
from hierarchy_builder.build.stages import ExtractStage
from hierarchy_builder.build.workers import has_gpu
from hierarchy_builder.config import ExtractConfig
from hierarchy_builder.encoders import Encoder, load_encoder
from hierarchy_builder.encoders.probe import check_probe, probe_value
from hierarchy_builder.errors import BuilderError, TooManySkippedError, UsageError
from hierarchy_builder.fields import identity, to_mapping
from hierarchy_builder.files import size_on_disk, write_json
from hierarchy_builder.images.sources import ImageSource, open_source
from hierarchy_builder.records import Status, blocks_of
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import in_build_order, read_index, status_name, write_index
from hierarchy_builder.store.ledger import begin_stage, known_entry
from hierarchy_builder.store.units import relative_source, stored_source
from hierarchy_builder.terminal import counted


def list_images(
    folder: BuildFolder, source: str | None, config: ExtractConfig, class_map: str | None = None
) -> ImageSource:
    """The images of a build; without `source` those in its manifest, with the class map it began with.

    Raises UsageError where the build would lie among its images.
    """
    if source is None:
        source, class_map = stored_source(folder), str(folder.class_map)
    folder.check_apart(os.path.join(source, config.split or ""))
    return open_source(source, split=config.split, class_map=class_map)


def extract(
    folder: BuildFolder,
    source: str | ImageSource | None,
    config: ExtractConfig,
    session: Session,
    *,
    class_map: str | None = None,
    retry_failed: bool = False,
    accept_new_files: bool = False,
    later: Callable[[int, Mapping[str, Any]], Mapping[str, int]] | None = None,
) -> StageSummary:
    """Images → index.parquet and features.zarr. Without `source` the one in the manifest is taken up again.

    retry_failed: of a finished stage do the images again that could not be used; see `retry.py`.
    accept_new_files: append images that came since the build began; see `additions.py`.
    later: from the number of images and the description of the encoder, the bytes of what shall follow (`space.py`).
    Raises ConfigMismatchError when the folder holds another configuration, encoder or listing, or when the encoder
    does not see the probe pictures as it should, TooManySkippedError when more images than allowed could not be
    used, BuilderError when the disk has no room for it and what follows.
    """
    if retry_failed and session.fresh:
        raise UsageError("--retry-failed goes on with what --fresh removes: give one of them")
    images = source if isinstance(source, ImageSource) else list_images(folder, source, config, class_map)
    for warning in images.warnings:
        session.reporter.say(f"warning: {warning}")
    accepts = accept_new_files and not session.fresh
    images, config = settle_rows(folder, images, config, session, accept=accepts)
    records = images.records
    assert config.block_rows is not None
    encoder = load_encoder(config.encoder, weights=config.weights, precision=config.precision)
    parts = {} if session.fresh else parts_of(folder, images, accept=accepts)
    inputs = {**extract_inputs(images, config, encoder), **parts}
    needed = extract_bytes(len(records), encoder.describe(), config.block_rows)
    following = {} if later is None else later(len(records), encoder.describe())
    check_space(folder, {**needed, **following}, force=session.force)
    facts = {
        "source": relative_source(folder, images.location),
        "probe": probe_of(folder, encoder, config, session),
        "request": to_mapping(config),
        "class_map": images.class_map,
    }
    if retry_failed:
        again = reopen_failed(folder, records, images, inputs)
        session.reporter.say(f"tried again: {counted(again, 'image')} that could not be used")
    if accepts:
        session.reporter.say(f"{append(folder, records, inputs)} new images are appended")
    ledger = begin_stage(folder, "extract", inputs, facts, fresh=session.fresh)
    write_json(folder.class_map, images.class_map)
    write_index(folder.listing, records)
    blocks = blocks_of(len(records), config.block_rows)
    if not folder.index.exists():
        write_index(folder.index, records)
    stores.create_features(
        folder.features,
        num_rows=len(records),
        block_rows=config.block_rows,
        grid=encoder.grid,
        width=encoder.width,
    )
    del encoder
    load = partial(ExtractStage.load, folder, images.location, config, retry_failed or accepts)
    done, seconds = do_units(load, ledger, blocks, session, "extract", uses_gpu=True)
    results = ledger.results(range(len(blocks)))
    outcomes = [row for result in results for row in result["outcomes"]]
    write_index(folder.index, records, outcomes)
    check_skipped(folder, outcomes, config.max_bad_fraction, session)
    return StageSummary(
        stage="extract",
        images=len(records),
        new_images=done,
        seconds=seconds,
        num_bytes=size_on_disk(folder.features),
        notes={**count_statuses(outcomes), **smaller_batches(results, config)},
    )


def extract_inputs(images: ImageSource, config: ExtractConfig, encoder: Encoder) -> dict[str, Any]:
    """Everything that decides the features, as JSON gives it back; `config` is settled."""
    description = json.loads(json.dumps(encoder.describe()))  # a tuple is a list in the manifest
    return {
        "config": {**identity(config), "encoder": description["name"]},
        "encoder": description,
        "num_images": len(images.records),
        "num_classes": max(images.class_map.values()) + 1,
        "listing_hash": images.listing_hash,
    }


def settle_rows(
    folder: BuildFolder, images: ImageSource, config: ExtractConfig, session: Session, *, accept: bool
) -> tuple[ImageSource, ExtractConfig]:
    """The images in the order of rows, and the configuration with its open fields settled; see `in_row_order`."""
    if session.fresh:
        images = replace(images, records=in_build_order(images.records, config.order))
    else:
        images = in_row_order(folder, images, config.order, accept=accept)
        config = same_blocks(folder, config, accept=accept)
    return images, settle(folder, config.for_images(len(images.records)), session)


def settle(folder: BuildFolder, config: ExtractConfig, session: Session) -> ExtractConfig:
    """The same with precision `auto` settled, so that a build is never continued in another arithmetic."""
    if config.precision != "auto":
        return config
    began = None if session.fresh else known_entry(folder, "extract")
    if began:
        return replace(config, precision=began["inputs"]["config"]["precision"])
    return replace(config, precision="bfloat16" if has_gpu(session.workers) else "float32")


def probe_of(folder: BuildFolder, encoder: Encoder, config: ExtractConfig, session: Session) -> list[float]:
    """Probe value of the encoder, checked; a build keeps the one it began with."""
    began = None if session.fresh else known_entry(folder, "extract")
    # Of another encoder or without a unit done, the ledger decides whether the build may go on at all.
    same = began and began["inputs"]["encoder"] == encoder.describe()
    markers = [*folder.markers("extract"), *folder.markers("fuse")]
    recorded = began["probe"] if began and same and markers else None
    value = probe_value(encoder)
    if check_probe(encoder, value, config.precision, recorded) == "new":
        session.reporter.say(
            f"encoder {encoder.name}: no reference is known of these weights "
            f"({encoder.weights_hash[:12]}…); what it sees now is recorded and asked of every later run"
        )
    return value if recorded is None else recorded


def count_statuses(outcomes: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return dict(sorted(Counter(outcome["status"] for outcome in outcomes).items()))


def smaller_batches(results: Sequence[Mapping[str, Any]], config: ExtractConfig) -> dict[str, int]:
    """The smallest batch of the units where memory ran out and it was halved; nothing where it was not."""
    sizes = [result["batch_size"] for result in results if "batch_size" in result]
    return {"batch_size": min(sizes)} if sizes and min(sizes) < config.batch_size else {}


def check_skipped(
    folder: BuildFolder, outcomes: Sequence[Mapping[str, Any]], allowed: float, session: Session
) -> None:
    """Say how many images could not be used and why; raises TooManySkippedError above the allowed share."""
    bad = [row for row, outcome in enumerate(outcomes) if outcome["status"] != status_name(Status.OK)]
    if not bad:
        return
    if len(bad) == len(outcomes):
        raise BuilderError(
            f"{folder.index}: no image could be used, the first failed with: {outcomes[0]['reason']}"
        )
    reasons = Counter(outcomes[row]["reason"].partition(":")[0] for row in bad)
    counted = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    advice = f"see {folder.index}, mend them and repeat with --retry-failed"
    if len(bad) <= allowed * len(outcomes):
        session.reporter.say(f"{len(bad)} of {len(outcomes)} images could not be used ({counted}): {advice}")
        return
    paths = read_index(folder.index).column("path")
    named = [f"{paths[row]} ({outcomes[row]['reason']})" for row in bad[:5]]
    raise TooManySkippedError(
        f"{len(bad)} of {len(outcomes)} images could not be used, allowed is {allowed:.2%} ({counted}): "
        f"{'; '.join(named)}{' …' if len(bad) > 5 else ''}; {advice}, or raise --max-bad-fraction"
    )
