"""What staged and fused builds share: they list images, settle open options, check the encoder and count failures."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hierarchy_builder.build.changes import in_row_order, same_blocks
from hierarchy_builder.build.session import Session
from hierarchy_builder.build.workers import has_gpu
from hierarchy_builder.config import ExtractConfig, ShardConfig
from hierarchy_builder.encoders import Encoder
from hierarchy_builder.encoders.onnx import OnnxEncoder
from hierarchy_builder.encoders.probe import check_probe, probe_value
from hierarchy_builder.errors import BuilderError, TooManySkippedError, UsageError, VerificationError
from hierarchy_builder.fields import identity
from hierarchy_builder.files.whole import readable_json, repair_of, write_json
from hierarchy_builder.images.originals import changed_images, modified_ns, refuse_changed
from hierarchy_builder.images.sources import ImageSource, open_reader, open_source
from hierarchy_builder.images.table import ImageTable
from hierarchy_builder.records import Block, Status
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import in_build_order, read_images, read_index, status_name, write_index
from hierarchy_builder.store.ledger import Ledger, begin_stage, recorded_stages, stage_entry
from hierarchy_builder.store.units import gathered, relative_source, stored_source, told_blocks
from hierarchy_builder.terminal import counted


def list_images(
    folder: BuildFolder, source: str | ImageSource | None, config: ExtractConfig, class_map: str | None = None
) -> ImageSource:
    """List the images of a build; without `source` those in its manifest, with the class map it began with.

    Raises UsageError if the build folder lies among the images, VerificationError if the class map is another one.
    """
    if isinstance(source, ImageSource):
        return source
    if source is None:
        source, class_map = stored_source(folder), str(folder.class_map)
        began = stage_entry(folder, "extract").get("class_map")
        if began is not None and readable_json(folder.class_map) != began:
            raise VerificationError(
                f"{folder.class_map} is missing or not the class map that the build began with: "
                f"{repair_of(folder.manifest)}"
            )
        if "://" not in source and not os.path.exists(source):
            raise UsageError(
                f"{source}, the images of {folder.root}, is not there: put it back, or repeat the `build` command "
                "with the place where they are now"
            )
    folder.check_apart(os.path.join(source, config.split or ""))
    return open_source(source, split=config.split, class_map=class_map, partition=config.partition)


def extract_inputs(images: ImageSource, config: ExtractConfig, encoder: Encoder) -> dict[str, Any]:
    """Everything that decides the features, in the types of JSON; `config` is settled."""
    description = json.loads(json.dumps(encoder.describe()))  # a tuple is a list in the manifest
    return {
        "config": {**identity(config), "encoder": description["name"]},
        "encoder": description,
        "num_images": len(images.records),
        "num_classes": max(images.class_map.values()) + 1,
        "listing_hash": images.listing_hash,
    }


def settle_rows(
    folder: BuildFolder,
    images: ImageSource,
    config: ExtractConfig,
    session: Session,
    *,
    accept: bool = False,
    fused: ShardConfig | None = None,
) -> tuple[ImageSource, ExtractConfig]:
    """Put the images into the order of rows, and settle the open options; see `in_row_order`.

    fused: that of the shards of a fused build. If there are many, a block is one shard, which saves a copy.
    """
    if session.fresh or fused is not None:
        images = replace(images, records=in_build_order(images.records, config.order))
    else:
        images = in_row_order(folder, images, config.order, accept=accept)
        config = same_blocks(folder, config, accept=accept)
    count = len(images.records)
    has_many = fused is not None and fused.shard_bytes is None and count >= 16 * fused.samples_per_shard
    if fused is not None and has_many and config.block_rows is None:
        config = replace(config, block_rows=fused.samples_per_shard)
    config = config.for_images(count)
    if config.precision == "auto":  # a build is never resumed in another precision
        began = None if session.fresh else recorded_stages(folder).get("extract")
        if began:
            config = replace(config, precision=began["inputs"]["config"]["precision"])
        else:
            config = replace(config, precision="bfloat16" if has_gpu(session.workers) else "float32")
    return images, config


def probe_of(folder: BuildFolder, encoder: Encoder, config: ExtractConfig, session: Session) -> list[float]:
    """Check the probe value of the encoder and return it; a build keeps the value it began with."""
    began = None if session.fresh else recorded_stages(folder).get("extract")
    # If the encoder differs or no unit is done, the ledger decides whether the build may resume.
    same = began and began["inputs"]["encoder"] == encoder.describe()
    markers = [*folder.markers("extract"), *folder.markers("fuse")]
    recorded = began["probe"] if began and same and markers else None
    if isinstance(encoder, OnnxEncoder):
        session.reporter.say(encoder.choices())
    value = probe_value(encoder)
    if check_probe(encoder, value, config.precision, recorded) == "new":
        session.reporter.say(
            f"encoder {encoder.name}: no reference value is known for these weights "
            f"({encoder.weights_hash[:12]}…); its probe value is recorded, and every later run is checked against it"
        )
    return value if recorded is None else recorded


def refuse_changed_images(folder: BuildFolder, images: ImageSource, config: ExtractConfig) -> None:
    """Raise ConfigMismatchError if an image that a build has encoded is another file now, which its size does not tell.

    Images on a remote file system have no time of change, and reading all of them again costs too much here.
    """
    entry = recorded_stages(folder).get("extract")
    if not folder.listing.exists() or entry is None:
        return
    now, inputs = images.records, entry["inputs"]
    same = np.ones(len(now), bool)
    if (inputs["listing_hash"], inputs["config"].get("order")) == (images.listing_hash, config.order):
        before = now
    else:
        before = read_images(folder.listing)[: inputs["num_images"]]
        place = pc.index_in(before.column("path"), value_set=now.column("path"))
        # the listing tells of images that have another size or are gone
        same = pc.equal(now.column("bytes").take(place), before.column("bytes")).fill_null(False).to_numpy()
    changed = list[str]()
    for paths, outcomes in _encoded(folder, before, same):
        changed += changed_images(paths, outcomes, images.reader)
    refuse_changed(images.location, changed)


def refuse_lost_images(folder: BuildFolder) -> None:
    """Raise an error if an image of which a picture shall be stored is gone, or another file than the one encoded.

    Images on a remote file system are left out, as in `refuse_changed_images`.
    """
    place, before = stored_source(folder), read_images(folder.listing)
    reader, changed, gone = open_reader(place), list[str](), list[str]()
    for paths, outcomes in _encoded(folder, before, np.ones(len(before), bool)):
        changed += changed_images(paths, outcomes, reader)
        gone += [path for path in paths if modified_ns(reader, path) is None]
    refuse_changed(place, changed)
    if gone:
        raise BuilderError(
            f"{place}: {counted(len(gone), 'image')} missing: {', '.join(gone[:5])}{' …' if gone[5:] else ''}; "
            "restore what was encoded, or make shards with --no-images"
        )


def _encoded(
    folder: BuildFolder, listed: ImageTable, chosen: np.ndarray
) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
    """Yield block by block the paths of the chosen images whose time of change is known, and what was told of them."""
    paths = listed.column("path")
    for block, told in told_blocks(folder):
        here = chosen[block.start : block.stop]
        told = told.select(["status", "file_hash", "modified"])[: len(here)]
        known = pc.and_(pa.array(here), told.column("modified").is_valid())
        yield paths[block.start : block.stop].filter(known).to_pylist(), told.filter(known).to_pylist()


def begin_images(
    folder: BuildFolder,
    stage: str,
    images: ImageSource,
    inputs: Mapping[str, Any],
    facts: Mapping[str, Any],
    session: Session,
) -> Ledger:
    """Record the stage that encodes the images, and the images as listed; see `begin_stage`."""
    facts = {
        **facts,
        "source": relative_source(folder, images.location),
        "class_map": images.class_map,
        "left_out": images.left_out,
    }
    records = images.records
    ledger = begin_stage(
        folder, stage, inputs, facts, fresh=session.fresh, repairs=session.repairs, records=records
    )
    write_json(folder.class_map, images.class_map)
    write_index(folder.listing, records)
    if not folder.index.exists():
        write_index(folder.index, records)
    return ledger


def end_images(
    folder: BuildFolder,
    ledger: Ledger,
    blocks: Sequence[Block],
    records: ImageTable,
    config: ExtractConfig,
    session: Session,
) -> dict[str, int]:
    """Write the index when all images are encoded; returns how many have which status, and a batch size if it shrank.

    Raises TooManySkippedError, see `check_skipped`.
    """
    outcomes, batch_sizes = gathered(ledger, blocks)
    write_index(folder.index, records, outcomes)
    check_skipped(folder, outcomes, config.max_bad_fraction, session)
    notes = dict(sorted(Counter(outcomes.column("status").to_pylist()).items()))
    batch_size = min([config.batch_size, *batch_sizes])
    return notes | ({"batch_size": batch_size} if batch_size < config.batch_size else {})


def check_skipped(folder: BuildFolder, outcomes: pa.Table, allowed: float, session: Session) -> None:
    """Report how many images could not be used and why; raises TooManySkippedError above the allowed share."""
    is_bad = pc.not_equal(outcomes.column("status"), status_name(Status.OK))
    bad = outcomes.column("reason").filter(is_bad).to_pylist()
    if not bad:
        return
    if len(bad) == len(outcomes):
        raise BuilderError(f"{folder.index}: no image could be used, the first failed with: {bad[0]}")
    reasons = Counter(reason.partition(":")[0] for reason in bad)
    by_reason = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    advice = f"see {folder.index}, repair them and repeat with --retry-failed"
    if len(bad) <= allowed * len(outcomes):
        session.reporter.say(
            f"{len(bad)} of {len(outcomes)} images could not be used ({by_reason}): {advice}"
        )
        return
    paths = read_index(folder.index, ["path"]).column("path").filter(is_bad)[:5].to_pylist()
    named = [f"{path} ({reason})" for path, reason in zip(paths, bad, strict=False)]
    raise TooManySkippedError(
        f"{len(bad)} of {len(outcomes)} images could not be used, allowed is {allowed:.2%} ({by_reason}): "
        f"{'; '.join(named)}{' …' if len(bad) > 5 else ''}; {advice}, or raise --max-bad-fraction"
    )
