"""What `plan` says of a build: images, bytes, shards and stages, as records and as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hierarchy_builder.errors import BuilderError, ConfigMismatchError
from hierarchy_builder.store.folder import BuildFolder

NAMED_IMAGES = 20
"""Unreadable images named at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """What the build would do of one stage.

    state: `to do`, `goes on`, `done`, `starts over` (--fresh), or `refused` with what `differs` line by line.
    images: still to do, of `units` − `units_done` units. seconds: for them, with start-up.
    """

    stage: str
    units: int
    units_done: int
    images: int
    state: str
    seconds: float
    differs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What `hierarchy-builder plan` says.

    classes: class → images. tried: images of the rehearsal, of which `unreadable` (path → reason). usable: images
    expected in the shards. sizes: bytes by place in the build folder. uncertainty: largest relative error of one of
    them to be expected (two standard errors). present: bytes that are there. scratch: bytes in use meanwhile and gone
    at the end. shards: names, samples and bytes of the tars.
    """

    source: str
    num_images: int
    input_bytes: int
    classes: Mapping[str, int]
    warnings: Sequence[str]
    tried: int
    unreadable: Mapping[str, str]
    usable: int
    sizes: Mapping[str, int]
    uncertainty: float
    shards: Mapping[str, Any]
    stages: Sequence[StagePlan]
    present: int
    scratch: int
    free: int

    @property
    def total(self) -> int:
        """Bytes of the finished build."""
        return sum(self.sizes.values())

    @property
    def missing(self) -> int:
        """Bytes still to be written, at their most."""
        return max(0, self.total - self.present) + self.scratch

    @property
    def seconds(self) -> float:
        """Time of all that is still to do."""
        return sum(stage.seconds for stage in self.stages)

    def as_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        sums = {"total": self.total, "missing": self.missing, "seconds": self.seconds}
        return {**asdict(self), **sums, "fits": self.missing <= self.free}

    def check(self, folder: BuildFolder, *, force: bool) -> None:
        """Raise what the build would end with at once: ConfigMismatchError, or BuilderError without room for it."""
        for stage in self.stages:
            if stage.state == "refused":
                raise ConfigMismatchError(
                    f"{folder.root} was made with another {stage.stage} configuration or input:\n  "
                    + "\n  ".join(stage.differs)
                )
        if self.missing > self.free and not force:
            raise BuilderError(
                f"{folder.root}: {self.missing:,} bytes are still to be written, {self.free:,} are free there: "
                "make room or choose another --out"
            )


def plan_tables(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """Tables of a plan for people, by title; small sets show every class."""
    counts = sorted(plan.classes.values())
    room = "fits" if plan.missing <= plan.free else "DOES NOT FIT"
    summary: dict[str, Any] = {
        "images": f"{plan.num_images:,} ({plan.input_bytes:,} bytes)",
        "classes": f"{len(counts):,}, of {counts[0]:,} to {counts[-1]:,} images",
        "tried": f"{plan.tried:,}, unreadable {len(plan.unreadable)}",
        "usable": f"{plan.usable:,}",
        "shards": "{count} of {samples:,} images, {bytes:,} bytes: {first} … {last}".format(**plan.shards),
        "bytes": f"{plan.total:,} (± {plan.uncertainty:.1%}), of which {plan.present:,} are there",
        "to write": f"{plan.missing:,}, free {plan.free:,}: {room}",
        "time": f"{plan.seconds:,.0f} s",
    }
    tables: dict[str, list[dict[str, Any]]] = {
        "Build": [{"name": name, "value": value} for name, value in summary.items()]
    }
    if len(counts) <= NAMED_IMAGES:
        tables["Classes"] = [{"class": name, "images": count} for name, count in plan.classes.items()]
    if plan.unreadable:
        named = list(plan.unreadable.items())[:NAMED_IMAGES]
        tables["Unreadable"] = [{"path": path, "reason": reason} for path, reason in named]
    tables["Bytes"] = [{"artefact": name, "bytes": f"{size:,}"} for name, size in plan.sizes.items()]
    tables["Stages"] = [
        {
            "stage": stage.stage,
            "units": f"{stage.units_done}/{stage.units}",
            "images to do": f"{stage.images:,}",
            "seconds": f"{stage.seconds:,.1f}",
            "state": "; ".join((stage.state, *stage.differs)),
        }
        for stage in plan.stages
    ]
    return tables
