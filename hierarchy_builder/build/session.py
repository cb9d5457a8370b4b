"""What a build is asked for, how a step runs (its workers and its reporter), and the summary that it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hierarchy_builder.build.stages import Stage
from hierarchy_builder.build.workers import Workers, map_units
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig, VocabularyConfig
from hierarchy_builder.encoders import Encoder
from hierarchy_builder.fields import brief, from_mapping, to_mapping
from hierarchy_builder.progress import Reporter
from hierarchy_builder.records import Block
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.ledger import Ledger


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSummary:
    """The result of one step: images in the artefact, images done in this run, its seconds, bytes on disk."""

    stage: str
    images: int
    new_images: int = 0
    seconds: float = 0.0
    num_bytes: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def images_per_second(self) -> float:
        return self.new_images / self.seconds if self.seconds else 0.0

    def as_row(self) -> dict[str, Any]:
        """The summary as plain data."""
        return {**asdict(self), "images_per_second": round(self.images_per_second, 2)}


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildPlan:
    """The configuration of every step of one build."""

    __repr__ = brief

    extract: ExtractConfig
    hierarchy: HierarchyRecipe
    shard: ShardConfig
    vocabulary: VocabularyConfig | None = None

    def as_mapping(self) -> dict[str, Any]:
        """All sections as plain data, as a config file holds them."""
        return to_mapping(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """Options that all steps of a run share."""

    workers: Workers = field(default_factory=Workers)
    reporter: Reporter = field(default_factory=Reporter)
    fresh: bool = False
    force: bool = False
    """Start even if the result may not fit on the disk."""
    trust_encoder: bool = False
    """Load the encoder that a build names even if it is a function, which runs code."""
    repairs: bool = False
    """Whether units of a build are made again, from the same encoder and images as before and no others."""
    encoder_at: Mapping[str, str] = field(default_factory=dict)
    """`encoder` and `weights` where they lie now, in place of those that a build names; they have to be the same."""

    def asked_to_extract(self, request: Mapping[str, Any]) -> ExtractConfig:
        """The configuration of extract that a build was made with, and where its encoder lies now."""
        return from_mapping(ExtractConfig, {**request, **self.encoder_at}, "extract")


def do_units(
    load: Callable[..., Stage],
    ledger: Ledger,
    units: Sequence[Block],
    session: Session,
    *,
    encoder: Callable[[], Encoder] | None = None,
    after_unit: Callable[[], None] = lambda: None,
) -> StageSummary:
    """Run the units that are not marked as done; the summary that is returned lacks bytes and notes.

    encoder: what other processes may encode with, see `workers.open_pool`.
    after_unit: called in this process after each unit, in their order.
    """
    todo = ledger.missing(units)
    total, waiting = sum(map(len, units)), sum(map(len, todo))
    stage, live = ledger.folder.name, BuildFolder(ledger.folder.parents[1]).live
    if 0 < waiting < total:
        session.reporter.say(
            f"{stage}: goes on after {total - waiting:,} of {total:,} images, which are done"
        )
    with session.reporter.stage(stage, total, total - waiting, live) as meter:
        for result in map_units(load, ledger, todo, session.workers, encoder):
            meter.advance(result["images"], result["failed"])
            after_unit()
        return StageSummary(stage=stage, images=total, new_images=meter.done, seconds=meter.seconds)
