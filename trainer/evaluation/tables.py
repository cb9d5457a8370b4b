"""Metrics by topic, for terminals and pages: which name belongs where, and what stands beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Topic:
    """One table of metrics."""

    title: str
    names: str
    """Regular expression of how its names begin."""
    note: str = ""
    """What a reader must know to read it, in one sentence."""
    beside: Mapping[str, str] = field(default_factory=dict)
    """Ending of a name → column in which it stands beside the name without it."""


REAL = {"_real": "real images"}
TOPICS = (
    Topic(title="Samples", names="class_mean_|flatness|roughness", beside=REAL),
    Topic(
        title="Levels", names="pmr_|level_consistency_|decoded_consistency_", note="0 is best.", beside=REAL
    ),
    Topic(
        title="Distribution",
        names="frechet_|precision|recall|fid|inception_score|num_",
        note="Of samples against real images; real images: one half of them against the other.",
        beside=REAL,
    ),
    Topic(
        title="Edits",
        names="lis_|gain_",
        note="Against the same trajectory unedited, resumed with the same noise; other noise: unedited, with noise of "
        "another seed. Names end in the level edited and the level measured; low and high bound 95 %.",
        beside={"_low": "low", "_high": "high", "_other_noise": "other noise"},
    ),
    Topic(
        title="Alignment",
        names="alignment_",
        note="Boundary F along the path to each level, before its last step; real images: from the level before of a "
        "photograph, against the regions of its teacher.",
        beside=REAL,
    ),
    Topic(title="Likelihood", names="noise|bits_per_dim|added_bits_per_dim", note="Of real images, in bits."),
)
OTHER = Topic(title="Other", names="")


def metric_tables(rows: Iterable[Mapping[str, Any]]) -> dict[Topic, list[dict[str, Any]]]:
    """Rows name/value as tables by topic, in the order of `TOPICS`; topics without rows are left out.

    Values in the columns of `Topic.beside` are "" where there is none.
    """
    values = {row["name"]: row["value"] for row in rows}
    tables = {}
    for topic in (*TOPICS, OTHER):
        own = {name: values.pop(name) for name in list(values) if re.match(topic.names, name)}
        if own:
            tables[topic] = _folded(own, topic.beside)
    return tables


def _folded(values: Mapping[str, Any], beside: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row for each name that is not another one with one of the endings."""
    ending_of = {
        f"{name}{ending}": ending for name in values for ending in beside if f"{name}{ending}" in values
    }
    used = [column for ending, column in beside.items() if ending in ending_of.values()]
    table = {
        name: {"name": name, "value": value, **dict.fromkeys(used, "")}
        for name, value in values.items()
        if name not in ending_of
    }
    for name, ending in ending_of.items():
        table[name.removesuffix(ending)][beside[ending]] = values[name]
    return list(table.values())
