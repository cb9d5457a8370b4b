"""The figures of a run in words: a name that a reader understands, which direction is better, and the definition.

Pages use them; terminals and files keep the short names, which docs/metrics.md defines in full.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hierarchy_builder.canvases.gallery import Definitions, Section, Term

HIGHER, LOWER = "↑", "↓"


@dataclass(frozen=True, slots=True)
class Definition:
    """One figure, or one for each level or pair of levels."""

    names: str
    """Regular expression of its short names; groups are numbers of levels."""
    words: str
    text: str
    better: str = ""
    """HIGHER, LOWER, or "" where neither is better in itself."""
    where: str = "level {}"
    """What the groups say, after the words."""


OF_PICTURES = "Of pictures: the same of decoded samples, in the features of another encoder."
DEFINITIONS = (
    Definition(
        "class_mean_accuracy",
        "samples recognised as their class",
        "Share of samples whose nearest class mean, "
        "among the means of real images, is that of their own class.",
        HIGHER,
    ),
    Definition(
        "class_mean_chance",
        "recognised by guessing",
        "1 divided by the number of classes: the share that guessing reaches.",
    ),
    Definition(
        "flatness(_noise|_real_tokens)?",
        "flatness of the coarsest level",
        "Share of the variance of the tokens on level 0 that two regions explain; a teacher has 1. "
        "Noise and the tokens of real images themselves ignore the hierarchy.",
        HIGHER,
        "of {}",
    ),
    Definition(
        "roughness(_noise|_real_tokens)?",
        "roughness of the coarsest level",
        "How much tokens differ within the two "
        "regions of level 0, divided by the spread of real tokens; a teacher has 0. "
        "Noise and the tokens of real images themselves ignore the hierarchy.",
        LOWER,
        "of {}",
    ),
    Definition(
        r"variety_(\d+)",
        "variety within a class",
        "Variance of the samples of one class, divided by that of "
        "its real images. 1: as varied as real images; 0: all samples of a class are equal.",
        HIGHER,
    ),
    Definition(
        "precision(_pictures)?",
        "precision",
        f"Share of samples that lie near a real image. {OF_PICTURES}",
        HIGHER,
        "of {}",
    ),
    Definition(
        "recall(_pictures)?",
        "recall",
        f"Share of real images that lie near a sample. {OF_PICTURES}",
        HIGHER,
        "of {}",
    ),
    Definition(
        "coverage(_pictures)?",
        "coverage",
        "Share of real images that have a sample nearer than their fifth nearest real neighbour. "
        + OF_PICTURES,
        HIGHER,
        "of {}",
    ),
    Definition(
        r"pmr_spatial_(\d+)_(\d+)",
        "tokens in a wrong parent region, by place",
        "Share of tokens that belong "
        "to another region of the coarser level than most tokens of their own finer region.",
        LOWER,
        "levels {} and {}",
    ),
    Definition(
        r"pmr_feature_(\d+)_(\d+)",
        "tokens in a wrong parent region, by features",
        "Share of tokens that "
        "resemble another region of the coarser level more than the parent of their own finer region.",
        LOWER,
        "levels {} and {}",
    ),
    Definition(
        r"level_consistency_(\d+)",
        "disagreement with the next level",
        "Mean 1 − cosine between the mean of a "
        "region and the mean of the same tokens one level finer; a teacher has 0.",
        LOWER,
    ),
    Definition(
        r"decoded_consistency_(\d+)",
        "disagreement of colours with the next level",
        "Mean absolute difference of the mean colours of a region, decoded from one level and from the next.",
        LOWER,
    ),
    Definition(
        "frechet_pooled",
        "Fréchet distance of images",
        "Distance of the Gaussians of the mean tokens of samples "
        "and of real images. It falls as the number of images grows, so compare equal numbers.",
        LOWER,
    ),
    Definition(
        r"frechet_tokens_(\d+)",
        "Fréchet distance of tokens",
        "Distance of the Gaussians of single tokens of samples and of real images.",
        LOWER,
    ),
    Definition(
        "frechet_pictures",
        "Fréchet distance of pictures",
        "Distance of the Gaussians of decoded samples and of "
        "real pictures, in the features of another encoder.",
        LOWER,
    ),
    Definition("fid", "FID", "Fréchet distance of decoded samples in the features of Inception-v3.", LOWER),
    Definition(
        "inception_score",
        "Inception score",
        "How surely and how variedly Inception-v3 names the decoded samples.",
        HIGHER,
    ),
    Definition(
        "inception_score_std",
        "spread of the Inception score",
        "Standard deviation over ten parts of the samples.",
    ),
    Definition("num_samples", "number of samples", "Generated images that were compared."),
    Definition("num_real", "number of real images", "Real images that they were compared with."),
    Definition("num_classes", "number of classes", "Classes with real images."),
    Definition(
        r"lis(?:_(\d+)_(\d+))?",
        "change of tokens not edited",
        "Mean 1 − cosine of the tokens that were not edited (LIS); 0 is perfectly local.",
        LOWER,
        "level {} edited, level {} measured",
    ),
    Definition(
        r"gain(?:_(\d+)_(\d+))?",
        "approach to what was put in",
        "By how much edited tokens moved towards the features "
        "that the edit put in, as a difference of cosines.",
        HIGHER,
        "level {} edited, level {} measured",
    ),
    Definition(
        "reached",
        "share of the way",
        "1 where edited tokens reached the features that were put in, 0 where "
        "they stayed, below 0 where they moved away.",
        HIGHER,
    ),
    Definition("inside", "change of edited tokens", "Mean 1 − cosine of the tokens that were edited."),
    Definition(
        "pixel_inside",
        "change of pixels, edited",
        "Mean absolute difference of decoded colours in the squares of edited tokens.",
    ),
    Definition(
        "pixel_outside",
        "change of pixels, not edited",
        "Mean absolute difference of decoded colours in all other squares.",
        LOWER,
    ),
    Definition(
        "feature_inside",
        "change seen by an encoder, edited",
        "Mean 1 − cosine of edited tokens, encoded again from the decoded pictures.",
    ),
    Definition(
        "feature_outside",
        "change seen by an encoder, not edited",
        "The same for tokens that were not edited.",
        LOWER,
    ),
    Definition("equal", "equal bit for bit", "Whether the level is the same bit for bit before and after."),
    Definition(
        "change", "change of all tokens", "Mean 1 − cosine of all tokens of the level, before and after."
    ),
    Definition(
        "changed_share",
        "share of tokens changed",
        "Share of tokens whose 1 − cosine is above 0.001, which is what rounding causes.",
    ),
    Definition(
        "largest",
        "largest difference",
        "Greatest absolute difference of two numbers of the canvas, in units of features.",
    ),
    Definition(
        r"alignment_(\d+)_(semantic|flat|shifted)",
        "borders on the way",
        "Boundary F between the regions found "
        "while a level is drawn and a partition: its own regions (semantic), regions without a hierarchy (flat), or "
        "its own regions moved to a wrong place (shifted). Semantic should exceed the two others early.",
        "",
        "level {}, {}",
    ),
    Definition(
        "noise",
        "noise of what is measured",
        "Standard deviation of the noise on the features, in units of normalised features.",
    ),
    Definition(
        r"bits_per_dim(?:_level_(\d+))?",
        "bits per number",
        "−log₂ of the density of a chain of states given its class, divided by the count of numbers.",
        LOWER,
    ),
    Definition(
        "bits_per_dim_bound",
        "bits per number, cleanest state",
        "Upper bound on the bits of the cleanest state alone.",
        LOWER,
    ),
    Definition(
        r"bits_per_dim_gaussian(?:_level_(\d+))?",
        "bits per number without a network",
        "Bits of the same chains under independent Gaussians, one for each channel.",
    ),
    Definition(
        "bits_per_dim_bound_gaussian",
        "bits per number without a network, cleanest state",
        "Bits of the cleanest state under the same Gaussians.",
    ),
    Definition(
        r"added_bits_per_dim(?:_level_(\d+))?",
        "added bits per number",
        "Bits above what the noise alone costs.",
        LOWER,
    ),
    Definition(
        r"added_bits_per_dim_step_(\d+)",
        "added bits by transition",
        "Added bits of one transition, from clean to noisy.",
        LOWER,
        "transition {}",
    ),
)


def find(name: str) -> tuple[Definition, str] | None:
    """The definition of a short name, and the level it is of in words; None for names of other programs."""
    for definition in DEFINITIONS:
        if match := re.fullmatch(definition.names, name):
            found = [group.strip("_").replace("_", " ") for group in match.groups() if group is not None]
            return definition, definition.where.format(*found) if found else ""
    return None


def term(name: str) -> str:
    """The name in words with its level and an arrow, linked to its definition; the name itself if it has none."""
    found = find(name)
    if found is None:
        return name
    definition, where = found
    text = ", ".join(filter(None, (definition.words, where)))
    return Term(f"{text} {definition.better}".strip(), of=definition.words)


def in_words(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a table with the names of figures in words, in headings and in the columns `name` and `measure`."""
    return [
        {term(key): term(value) if key in ("name", "measure") else value for key, value in row.items()}
        for row in rows
    ]


def definitions_section(terms: Iterable[Any]) -> list[Section]:
    """What these terms of a page mean, in the order in which they first occur; none if nothing is a term."""
    used = dict.fromkeys(each.of for each in terms if isinstance(each, Term))
    by_words = {definition.words: definition for definition in DEFINITIONS}
    entries = {words: f"{by_words[words].text} In files: {_spelled(by_words[words])}." for words in used}
    if not entries:
        return []
    text = f"{HIGHER} higher is better, {LOWER} lower is better; the other figures describe."
    return [Section(title="What the figures mean", text=text, blocks=[Definitions(entries=entries)])]


def _spelled(definition: Definition) -> str:
    """Its short names, with N for a number and brackets around what may be absent: `lis[_N_N]`."""
    return re.sub(r"\((?:\?:)?([^()]*)\)\?", r"[\1]", definition.names.replace(r"(\d+)", "N"))


def terms_of(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """All headings and cells of the rows of a table."""
    return [each for row in rows for pair in row.items() for each in pair]
