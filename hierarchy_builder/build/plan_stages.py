"""The stages of a build that is planned: what each is made with, how far the folder is, how long the rest takes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hierarchy_builder.build.additions import Growth, growth_of, parts_of
from hierarchy_builder.build.extraction import extract_inputs
from hierarchy_builder.build.forecast import StagePlan
from hierarchy_builder.build.fused import fused_inputs
from hierarchy_builder.build.pipeline import BuildPlan
from hierarchy_builder.build.rehearsal import Findings, Pace
from hierarchy_builder.build.session import Session
from hierarchy_builder.build.stages import one_thread
from hierarchy_builder.config import VocabularyConfig
from hierarchy_builder.encoders import load_encoder
from hierarchy_builder.fields import identity
from hierarchy_builder.images.masks import open_masks
from hierarchy_builder.images.sources import ImageSource
from hierarchy_builder.records import Block, ImageRecord, Status
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.index import status_name
from hierarchy_builder.store.ledger import Ledger, differences, hash_of, read_manifest
from hierarchy_builder.store.samples import PART_LEVEL
from hierarchy_builder.vocabulary.kmeans import sum_clusters

TRIED_TOKENS = 4_096
"""Tokens that are clustered to see how fast a vocabulary is fitted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """What each stage would be made with, and what the folder holds of it.

    inputs: stage → what the manifest would hold, in order; of a build in one pass the stage `fuse` alone. stored: the
    entries of the manifest, after images are appended where they are. growth: what becomes of its units then.
    """

    folder: BuildFolder
    inputs: Mapping[str, Mapping[str, Any]]
    stored: Mapping[str, Mapping[str, Any]]
    growth: Growth | None
    fresh: bool

    @property
    def is_fused(self) -> bool:
        """Whether the build is asked for in one pass."""
        return "fuse" in self.inputs

    @property
    def extracted(self) -> Mapping[str, Any]:
        """Inputs of `extract`, also of a build in one pass."""
        return self.inputs["fuse"]["extract"] if self.is_fused else self.inputs["extract"]

    @property
    def clustered(self) -> Mapping[str, Any]:
        """Inputs of `cluster`, likewise."""
        return self.inputs["fuse"]["cluster"] if self.is_fused else self.inputs["cluster"]

    def ledger(self, stage: str) -> Ledger:
        """The markers of a stage as they lie there now."""
        asked = hash_of(stage, self.inputs[stage])
        return Ledger(
            self.folder.ledger(stage), self.growth.hashes.get(stage, asked) if self.growth else asked
        )

    def is_done(self, stage: str, unit: int) -> bool:
        """Whether the build would leave a unit as it is."""
        if self.fresh or (self.growth and not self.growth.keeps(stage, unit)):
            return False
        return self.ledger(stage).is_done(unit)

    def differences(self, stage: str) -> tuple[str, ...]:
        """Why the build would be refused, a line each."""
        made = "in one pass" if "fuse" in self.stored else "by stages"
        asked = "in one pass" if self.is_fused else "by stages"
        if self.fresh or not self.stored:
            return ()
        if made != asked:
            return (f"made {made} there, {asked} now",)
        if not self.folder.markers(stage):
            return ()
        entry = self.stored.get(stage, {}).get("inputs", {})
        return tuple(
            f"{name}: {before!r} there, {now!r} now"
            for name, before, now in differences(entry, self.inputs[stage])
        )

    def usable(self, records: Sequence[ImageRecord], blocks: Sequence[Block], found: Findings) -> int:
        """Usable images: counted where they are done or tried, elsewhere as many as of those tried; at least one."""
        ledger, ok = self.ledger("fuse" if self.is_fused else "extract"), status_name(Status.OK)
        share, usable = len(found.samples) / found.num_images, 0.0
        for block in blocks:
            is_done = not self.fresh and ledger.is_done(block.number)
            rows = ledger.results([block.number])[0]["outcomes"] if is_done else []
            usable += sum(row["status"] == ok for row in rows)
            for record in records[block.start + len(rows) : block.stop]:
                tried = found.outcomes.get(record.path)
                usable += share if tried is None else tried["status"] == ok
        return max(1, round(usable))


def standing_of(
    folder: BuildFolder,
    images: ImageSource,
    plan: BuildPlan,
    session: Session,
    *,
    fused: bool,
    accept: bool,
) -> Standing:
    """Compare what is asked for with what `folder` holds; nothing is changed.

    images, plan: in the order of rows, with open fields settled. accept: whether images may be appended.
    """
    config = plan.extract
    encoder = load_encoder(config.encoder, weights=config.weights, precision=config.precision)
    extracted = extract_inputs(images, config, encoder)
    stored: Mapping[str, Any] = {} if session.fresh else read_manifest(folder)["stages"]
    if fused:
        inputs = {"fuse": fused_inputs(extracted, plan.hierarchy, plan.shard, images)}
        return Standing(folder=folder, inputs=inputs, stored=stored, growth=None, fresh=session.fresh)
    if not session.fresh:
        extracted |= parts_of(folder, images, accept=accept)
    growth = growth_of(folder, extracted) if accept and not session.fresh else None
    stored = growth.stages if growth else stored
    inputs = _inputs(plan, extracted, stored)
    return Standing(folder=folder, inputs=inputs, stored=stored, growth=growth, fresh=session.fresh)


def _inputs(
    plan: BuildPlan, extracted: Mapping[str, Any], stored: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """What each stage would be made with, in order, as the manifest holds it."""
    found = {"extract": dict(extracted)}

    def made(stage: str) -> str:
        return hash_of(stage, found[stage])

    if plan.vocabulary is not None:
        found["vocabulary"] = {"config": identity(plan.vocabulary), "extract": made("extract")}
    found["cluster"] = {"config": identity(plan.hierarchy), "extract": made("extract")}
    if plan.hierarchy.masks is not None:
        found["cluster"]["masks"] = open_masks(Path(plan.hierarchy.masks)).digest()
    if plan.vocabulary is not None:
        level = min(PART_LEVEL, len(plan.hierarchy.cuts))
        found["link"] = {
            "config": {"level": level},
            "vocabulary": made("vocabulary"),
            "cluster": made("cluster"),
        }
    found["shard"] = {
        "config": identity(plan.shard),
        "cluster": made("cluster"),
        "link": made("link") if "link" in found else stored.get("link", {}).get("hash"),
    }
    return found


def stage_plans(
    standing: Standing,
    plan: BuildPlan,
    found: Findings,
    session: Session,
    blocks: Sequence[Block],
    tars: Sequence[Block],
) -> list[StagePlan]:
    """What the build would do of every stage. found: how fast they are here."""
    encoder, usable = standing.extracted["encoder"], sum(map(len, tars))
    stages = []
    for stage in standing.inputs:
        units = {"vocabulary": [Block(number=0, start=0, stop=usable)], "shard": tars}.get(stage, blocks)
        todo = [unit for unit in units if not standing.is_done(stage, unit.number)]
        seconds = _seconds(found.paces[stage], todo, session)
        if stage == "vocabulary" and todo and plan.vocabulary is not None:
            tokens = usable * math.prod(encoder["grid"])
            seconds += _fitting_seconds(plan.vocabulary, tokens, encoder["width"], session)
        is_begun = bool(standing.folder.markers(stage))
        differs = standing.differences(stage)
        stages.append(
            StagePlan(
                stage=stage,
                units=len(units),
                units_done=len(units) - len(todo),
                images=sum(map(len, todo)),
                state=_state(is_begun, session.fresh, bool(differs), len(todo), len(units)),
                seconds=round(seconds, 1),
                differs=differs,
            )
        )
    return stages


def _state(is_begun: bool, is_fresh: bool, is_other: bool, num_todo: int, num_units: int) -> str:
    if is_fresh and is_begun:
        return "starts over"
    if is_other:
        return "refused"
    if not num_todo:
        return "done"
    return "goes on" if num_todo < num_units else "to do"


def _seconds(pace: Pace, todo: Sequence[Block], session: Session) -> float:
    """Time for the units of `todo`, as many at once as there are workers."""
    if not todo:
        return 0.0
    workers = _num_workers(session) or pace.units
    more = max(1.0, min(workers, len(todo)) / min(workers, pace.units))
    return pace.startup + sum(map(len, todo)) * pace.per_image / (pace.at_once * more)


def _num_workers(session: Session) -> int | None:
    """Processes that do units; None on a cluster, which is not asked."""
    if session.workers.address:
        return None
    return 1 if session.workers.count == 0 else session.workers.count or os.cpu_count() or 1


def _fitting_seconds(config: VocabularyConfig, num_tokens: int, width: int, session: Session) -> float:
    """Time of all iterations, from one over a few tokens here; k-means++ takes about as long as one of them."""
    tokens = np.random.default_rng(0).standard_normal((TRIED_TOKENS, width), np.float32)
    centroids = tokens[: min(config.num_prototypes, TRIED_TOKENS)]
    with one_thread():
        started = time.perf_counter()
        sum_clusters(tokens, centroids, threads=1)
        spent = time.perf_counter() - started
    products = min(config.sampled_tokens or num_tokens, num_tokens) * config.num_prototypes
    each = spent * products / (len(tokens) * len(centroids))
    return (config.iterations + 1) * each / (_num_workers(session) or 1)
