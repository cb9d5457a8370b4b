"""Tables of metrics by topic, for terminals and pages."""

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
    """Regular expression that matches the beginning of its names."""
    note: str = ""
    """Explanation under the title, in a sentence or two."""
    beside: Mapping[str, str] = field(default_factory=dict)
    """Ending of a name → column for its value, in the row of the name without the ending."""


REAL = {"_real": "real images"}
TOPICS = (
    Topic(title="Samples", names="class_mean_|flatness|roughness", beside=REAL),
    Topic(
        title="Levels", names="pmr_|level_consistency_|decoded_consistency_", note="0 is best.", beside=REAL
    ),
    Topic(
        title="Distribution",
        names="frechet_|precision|recall|fid|inception_score|num_",
        note="Samples compared with real images. The column real images compares one half of them with the other half.",
        beside=REAL,
    ),
    Topic(
        title="Edits",
        names="lis_|gain_",
        note="Edited trajectories compared with the same ones unedited, resumed with the same noise. The column other "
        "noise: unedited, with the noise of another seed. Names end in the edited and the measured level; low and high "
        "are the ends of a 95 % interval.",
        beside={"_low": "low", "_high": "high", "_other_noise": "other noise"},
    ),
    Topic(
        title="Alignment",
        names="alignment_",
        note="Boundary F on the way to each level, before its last step. The column real images: drawn from the "
        "previous level of a photograph, compared with the regions of its teacher.",
        beside=REAL,
    ),
    Topic(
        title="Likelihood",
        names="noise|bits_per_dim|added_bits_per_dim",
        note="Bits of real images.",
    ),
)
OTHER = Topic(title="Other", names="")


def metric_tables(rows: Iterable[Mapping[str, Any]]) -> dict[Topic, list[dict[str, Any]]]:
    """Sort rows name/value into tables by topic, in the order of `TOPICS`, without empty ones.

    A cell in a column of `Topic.beside` is "" if there is no such value.
    """
    values = {row["name"]: row["value"] for row in rows}
    tables = {}
    for topic in (*TOPICS, OTHER):
        own = {name: values.pop(name) for name in list(values) if re.match(topic.names, name)}
        if own:
            tables[topic] = _folded(own, topic.beside)
    return tables


def _folded(values: Mapping[str, Any], beside: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row for each name, except for names that are another name plus an ending."""
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
