"""The step from images to features: it lists images, checks the encoder, runs missing units and counts failures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from hierarchy_builder.build.changes import append, finish_carrying, parts_of, reopen_failed
from hierarchy_builder.build.inputs import (
    begin_images,
    end_images,
    extract_inputs,
    list_images,
    probe_of,
    refuse_changed_images,
    settle_rows,
)
from hierarchy_builder.build.session import Session, StageSummary, do_units
from hierarchy_builder.build.space import check_space, extract_bytes
from hierarchy_builder.build.stages import ExtractStage, asked_encoder
from hierarchy_builder.config import ExtractConfig
from hierarchy_builder.errors import UsageError
from hierarchy_builder.fields import to_mapping
from hierarchy_builder.files.whole import size_on_disk
from hierarchy_builder.images.sources import ImageSource
from hierarchy_builder.records import blocks_of
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.units import layout_of
from hierarchy_builder.terminal import counted


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
    """Images → index.parquet and features.zarr. Without `source`, the source in the manifest is used.

    retry_failed: repeat the images of a finished stage that could not be used; see `changes.py`.
    accept_new_files: append images that were added since the build began; see `changes.py`.
    later: returns the bytes of the later stages for a number of images and the description of the encoder.
    Raises ConfigMismatchError if the folder holds another configuration, encoder or listing, or if the probe value of
    the encoder differs, TooManySkippedError if more images failed than allowed, and BuilderError if this and the
    later stages do not fit on the disk.
    """
    if retry_failed and session.fresh:
        raise UsageError("--retry-failed goes on with what --fresh removes: give one of them")
    images = list_images(folder, source, config, class_map)
    for warning in images.warnings:
        session.reporter.say(f"warning: {warning}")
    accepts = accept_new_files and not session.fresh
    if not session.fresh:
        finish_carrying(folder)
    images, config = settle_rows(folder, images, config, session, accept=accepts)
    if not session.fresh:
        refuse_changed_images(folder, images, config)
    records = images.records
    assert config.block_rows is not None
    encoder = asked_encoder(config)
    parts = {} if session.fresh else parts_of(folder, images, accept=accepts)
    inputs = {**extract_inputs(images, config, encoder), **parts}
    needed = extract_bytes(len(records), encoder.describe(), config.block_rows)
    following = {} if later is None else later(len(records), encoder.describe())
    check_space(folder, {**needed, **following}, force=session.force)
    facts = {"request": to_mapping(config), "probe": probe_of(folder, encoder, config, session)}
    if retry_failed:
        again = reopen_failed(folder, records, images, inputs)
        session.reporter.say(f"tried again: {counted(again, 'image')} that could not be used")
    if accepts:
        session.reporter.say(f"{append(folder, records, inputs)} new images are appended")
    ledger = begin_images(folder, "extract", images, inputs, facts, session)
    blocks = blocks_of(len(records), config.block_rows)
    stores.create(*layout_of(folder, "extract"))
    del encoder
    load = partial(ExtractStage.load, folder, images.location, config)
    summary = do_units(load, ledger, blocks, session, encoder=partial(asked_encoder, config))
    notes = end_images(folder, ledger, blocks, records, config, session)
    return replace(summary, num_bytes=size_on_disk(folder.features), notes=notes)
