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


WORDS = (
    (0.1, "nearly alike"),
    (0.5, "much more alike than real ones"),
    (0.8, "somewhat more alike than real ones"),
)
"""What a ratio of variances within classes below a limit means; the limits are ours, to give a reader words."""
MORE_VARIED = 1.25


def numbered(values: Mapping[str, Any], name: str, ending: str = "") -> dict[int, Any]:
    """The values called `<name><number><ending>`, by their number."""
    found = {whole: re.fullmatch(rf"{name}(\d+){ending}", whole) for whole in values}
    return {int(match[1]): values[whole] for whole, match in found.items() if match}


def variety_verdict(values: Mapping[str, Any]) -> str:
    """Say in words what the least `variety_<level>` means, and recall beside that of real images."""
    levels = numbered(values, "variety_")
    if not levels:
        return (
            "Variance within classes was not measured: it needs two samples and two real images of a class."
        )
    level = min(levels, key=levels.__getitem__)
    limits = (words for limit, words in WORDS if levels[level] < limit)
    varied = "more varied than real ones" if levels[level] > MORE_VARIED else "about as varied as real ones"
    where = f"on level {level}, the least of {len(levels)}, " if len(levels) > 1 else ""
    share = f"{where}they have {levels[level]:.2g} of the variety of real images of their class"
    text = f"Samples of one class are {next(limits, varied)}: {share}."
    if {"recall", "recall_real"} <= set(values):
        text += (
            f" They come near {values['recall']:.0%} of the real images (recall); as many real images come near "
            f"{values['recall_real']:.0%} of others."
        )
    return text


REAL = {"_real": "real images"}
VARIETY = Topic(
    title="Variety",
    names="variety_|precision|recall|coverage",
    note="variety: variance within classes on each level, divided by that of real images; 0 means that all samples "
    "of a class are equal. Precision: share of samples near a real image. Recall and coverage: share of real "
    "images near a sample. The column real images compares one half of them with the other half.",
    beside=REAL,
)
TOPICS = (
    Topic(title="Samples", names="class_mean_|flatness|roughness", beside=REAL),
    VARIETY,
    Topic(
        title="Levels", names="pmr_|level_consistency_|decoded_consistency_", note="0 is best.", beside=REAL
    ),
    Topic(
        title="Distribution",
        names="frechet_|fid|inception_score|num_",
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
    Topic(title="Likelihood", names="noise|bits_per_dim|added_bits_per_dim", note="Bits of real images."),
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
