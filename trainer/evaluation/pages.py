"""Pages of a run: samples with scores and curves, edits next to their originals, and images that surprise the model.

L levels (coarse → fine) or T transitions (noisy → clean), H×W grid of tokens
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from hierarchy_builder.canvases.colours import hierarchy_colours
from hierarchy_builder.canvases.gallery import (
    Code,
    Gallery,
    LevelViewer,
    Page,
    Plots,
    Scale,
    Section,
    Table,
    View,
)
from hierarchy_builder.canvases.plots import Plot, Series
from hierarchy_builder.canvases.views import (
    REGIONS,
    HierarchyView,
    hierarchy_viewers,
    latent_views,
    level_names,
    shared_palette,
)
from hierarchy_builder.errors import TrainerError
from hierarchy_builder.files.untrusted.documents import read_document
from hierarchy_builder.files.untrusted.pictures import open_picture
from hierarchy_builder.files.whole import parse_json, without_nan
from hierarchy_builder.records import spread_evenly
from hierarchy_builder.terminal import counted
from trainer.data.normalisation import RAW, Normaliser
from trainer.data.reader import ShardReader, classes_with_images
from trainer.data.shards import ShardIndex
from trainer.decode.rae import to_uint8
from trainer.evaluation.definitions import FIGURES, TEXT, TITLE
from trainer.evaluation.studies import LIKELIHOOD
from trainer.evaluation.sweep import BASELINES, SETTING, table_in_words
from trainer.evaluation.tables import VARIETY, metric_tables, numbered, variety_verdict
from trainer.methods import registry
from trainer.methods.normalizing_trajectory.likelihood import measure
from trainer.methods.normalizing_trajectory.pipeline import NormalizingPipeline
from trainer.metrics.edit_locality import token_change
from trainer.training import checkpoint as saved
from trainer.training.log import METRICS, read_metrics
from trainer.training.run_folder import read_config, read_kept
from trainer.trajectories.compare import HEAT, compare, encoder_of, heat_map
from trainer.trajectories.pipeline import Decoder, TrajectoryPipeline
from trainer.trajectories.trajectory import Trajectory
from trainer.trajectories.view import TrajectoryView, facts_section, page_palette, samples_section

EVALUATION = "evaluation.json"
"""File of a run folder."""
SHOWN_CLASSES = SHOWN_TEACHERS = 12
LABELS_READ = 1_000
"""Images whose labels say which classes a report can show."""
SHOWN_IMAGES = 8
"""Images at each end of the list of likelihoods whose maps are shown."""
PALE, DEEP = np.array([247, 247, 244]), np.array([28, 60, 140])
"""Colours of no added bits and of the most."""
SCALE_STEPS = 9
"""Colours of the bar that states a scale; between them it is even."""
INTRO = (
    "This page shows what a network of {title} draws; it has seen {seen} training images, taken from {trained_on}. "
    "Each card is one generated image of a class on every level, from the coarsest, object and background, "
    "to the finest, single tokens. Compare the samples with the teacher hierarchies that the network was trained on; "
    "the tables below say how far both agree, and whether images of one class differ as much as real ones do."
)
TEACHER_TEXT = (
    "What the model was shown. Children share the hues of their parent region; latent colours are the same on "
    "every card of this page, teachers and samples alike. Where a card has a decoded picture, compare it at the finest "
    "level with the photograph: no sample can look better than what the decoder makes of a photograph's own tokens."
)
CURVES_TEXT = "Long curves are means of equal runs of points; the band spans least to greatest."
FALLING = {"raw_mse_u": "u, average velocity", "raw_mse_v": "v, instantaneous velocity"}
"""Squared errors behind losses that stay near 1, and the names of their curves: what falls in training."""
FALLING_TITLE = "squared errors: what falls in training"
LOSSES = ("loss", "loss_u", "loss_v", "region")
LOSS_TITLE = "losses"
PER_LEVEL = re.compile(r"(.+?)[_/](?:level_?)?(\d+)")
NOT_PLOTTED = frozenset({"step", "images", "seed", "time", "epoch"})
LOG_RATIO = 20.0
EDITS_TEXT = (
    "Each card shows a trajectory before and after an edit, and how far each token moved: "
    "1 − cosine, on one scale for all cards, shown above them. Levels before the edited one "
    "are identical bit for bit. LIS is the mean change of the tokens that were not edited."
)
SWEEP_TEXT = (
    "The same edit over classes and seeds, with two controls: the same trajectories without the edit, and with other "
    "noise. The edit itself causes only what exceeds both controls. Bands are 95 % intervals of the mean. The curves "
    "show the greatest strength; the table shows all."
)
SURPRISE_TEXT = (
    "Each map shows how many bits the model needs for a token beyond those of the noise on it, given the class and the "
    "previous level or, with one level, the previous transition (one step from noise to data). Darker tokens are more "
    "surprising; all cards share one scale per map. First come the images that need the most bits, then those that "
    "need the fewest, of {count} measured. The map of single tokens depends on the order in "
    "which the model reads them; the sum over tokens does not."
)
PLOTTED = {"lis": "change of tokens not edited (LIS)", "inside": "change of edited tokens"}
COMPARED = ("level", "change", "changed_share", "lis", "inside")


def run_page(
    run: Path,
    pipe: TrajectoryPipeline,
    trajectories: Sequence[Trajectory],
    index: ShardIndex | None = None,
    stages: Sequence[Mapping[str, Any]] = (),
    more: Sequence[Section] = (),
) -> Page:
    """The page of a run: samples, curves, scores of `trainer evaluate`, and teachers where shards are given.

    stages: rows of a table of the stages that led to the run, column → value. more: sections after the samples.
    Raises TrainerError if `run` is not a run folder.
    """
    content = read_config(run)
    state = saved.load_state(saved.find_checkpoint(run))
    seen = state.shards.get("num_samples")  # an imported checkpoint does not say
    method = registry.method_in(state.config, run)
    facts = {
        "preset": state.config["preset"],
        "parameters": f"{pipe.num_parameters:,}",
        "images seen": f"{state.images_seen:,}",
        "steps": f"{state.step:,}",
        "training time": f"{state.seconds / 60:.1f} min",
        "encoder": state.shards["encoder"].get("name", "unknown"),
        "training images": "unknown" if seen is None else f"{seen:,}",
        "classes": len(state.shards["class_names"]),
    }
    if colder := {f"{each.temperature:g}" for each in trajectories if each.temperature != 1}:
        facts["temperature of the samples"] = ", ".join(sorted(colder))
    trained_on = "unknown images" if seen is None else counted(seen, "image")
    log = read_metrics(run) if (run / METRICS).exists() else []
    return training_page(
        title=f"{method.title}: {state.config['preset']} on {trained_on}",
        intro=INTRO.format(title=method.title, trained_on=trained_on, seen=f"{state.images_seen:,}"),
        facts=facts,
        trajectories=[trajectory.view() for trajectory in trajectories],
        teachers=[] if index is None else teacher_views(index, pipe.decoder, pipe.normaliser.to("cpu")),
        measured=[
            *_score_sections(run, more),
            *curves_section([row for row in log if "loss" in row], method.losses_text),
            *([Section(title="Stages", blocks=[Table(rows=stages)])] if stages else []),
        ],
        maps=likelihood_sections(run, pipe, index) if index and isinstance(pipe, NormalizingPipeline) else (),
        config=content["config"],
    )


def training_page(
    *,
    title: str,
    facts: Mapping[str, Any],
    trajectories: Sequence[TrajectoryView] = (),
    teachers: Sequence[HierarchyView] = (),
    measured: Sequence[Section] = (),
    maps: Sequence[Section] = (),
    config: Mapping[str, Any] | None = None,
    intro: str = "",
) -> Page:
    """The page of a run; parts that are empty are left out.

    facts: name → value. measured: sections after samples and teachers; what their figures mean follows them. maps:
    sections after that. config: plain data, shown as YAML. The palette is fitted on the tokens of the teachers if
    there are any, since early samples may lie anywhere.
    """
    palette = page_palette(trajectories, teachers)
    sections = [*facts_section(facts), *samples_section(trajectories, palette)]
    if teachers:
        gallery = Gallery(viewers=hierarchy_viewers(teachers, palette), start=1)
        sections.append(Section(title="Teacher hierarchies", text=TEACHER_TEXT, blocks=[gallery]))
    sections += measured
    sections += FIGURES.meanings(sections, TITLE, TEXT)
    sections += maps
    if config:
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        code = Code(summary="Resolved configuration", text=text)
        sections.append(Section(title="Configuration", blocks=[code]))
    return Page(title=title, intro=intro, sections=sections)


def curves_section(log: Sequence[Mapping[str, Any]], losses_text: str = "") -> list[Section]:
    """The curves of a training, if there are any.

    log: the rows of metrics.jsonl (`images`, or else `step`, is the x axis; every other number is a curve).
    losses_text: what the method says about its losses.
    """
    text = " ".join(filter(None, ("From metrics.jsonl.", losses_text, CURVES_TEXT)))
    plots = training_plots(log)
    return [Section(title="Curves", text=text, blocks=[Plots(plots=plots)])] if plots else []


def training_plots(log: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """One plot of the losses, one per measure that has a curve for each level, and one per remaining number."""
    x_name = "images" if any("images" in row for row in log) else "step"
    plots: dict[str, list[Series]] = {FALLING_TITLE: [], LOSS_TITLE: []}
    for name in dict.fromkeys(name for row in log for name in row if name not in NOT_PLOTTED):
        rows = [row for row in log if _is_number(row.get(name)) and _is_number(row.get(x_name))]
        if rows:
            title, label = _place(name)
            line = Series(name=label, x=[row[x_name] for row in rows], y=[row[name] for row in rows])
            plots.setdefault(title, []).append(line)
    return [_plot(title, series, x_name) for title, series in plots.items() if series]


def _place(name: str) -> tuple[str, str]:
    """The title of a curve's plot, and its own name there: losses share one, and the levels of one measure do."""
    if name in FALLING:
        return FALLING_TITLE, FALLING[name]
    if name in LOSSES:
        return LOSS_TITLE, name
    per_level = PER_LEVEL.fullmatch(name)
    return (f"{per_level[1]} per level", f"level {per_level[2]}") if per_level else (name, name)


def _plot(title: str, series: Sequence[Series], x_name: str) -> Plot:
    values = np.array([y for line in series for y in line.y if np.isfinite(y)])
    log_y = len(values) > 0 and values.min() > 0 and values.max() / values.min() > LOG_RATIO
    x_label = "images seen" if x_name == "images" else x_name
    title = title.replace("grad_norm", "norm of the gradient").replace("_", " ")
    return Plot(title=title, x_label=x_label, series=series, log_y=bool(log_y))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def shown_labels(classes: Sequence[int]) -> list[int]:
    """The classes that a report shows, spread evenly over these."""
    return [classes[i] for i in spread_evenly(len(classes), SHOWN_CLASSES)]


def known_classes(run: Path, pipe: TrajectoryPipeline, index: ShardIndex | None = None) -> Sequence[int]:
    """The classes that had images when the run was evaluated, or have some in these shards, or had some in training.

    Shards that lie elsewhere are not asked, because their labels cannot be read without downloading them.
    """
    if kept := read_kept(run / EVALUATION).get("classes"):
        return list(kept)
    if index is not None and not index.is_remote:
        return classes_with_images(index, LABELS_READ)
    return pipe.classes


def teacher_views(
    index: ShardIndex,
    decoder: Decoder | None = None,
    normaliser: Normaliser = RAW,
) -> list[HierarchyView]:
    """Samples spread evenly over the shards, with their regions and, where the shards store them, photographs.

    normaliser: the one of the run that was trained on these teachers.
    """
    reader = ShardReader(index)
    views = []
    for number in spread_evenly(index.num_samples, SHOWN_TEACHERS):
        sample = reader.read(number, extras=True)
        features = torch.from_numpy(sample.features[None]).float()
        canvases = normaliser.teacher_canvases(features, torch.from_numpy(sample.regions[None]))[0]
        views.append(
            HierarchyView(
                key=sample.key,
                class_name=index.class_names[sample.label],
                regions=sample.regions,
                canvases=canvases.numpy(),
                photo=_photo(sample.image),
                decoded=None if decoder is None else to_uint8(decoder(canvases)).cpu().numpy(),
            )
        )
    reader.close()
    return views


def _score_sections(run: Path, more: Sequence[Section]) -> Iterator[Section]:
    """What `trainer evaluate` kept in a run, its variety in words before `more`, and tables of the rest after it."""
    evaluation = read_kept(run / EVALUATION)
    judged = str(evaluation.get("judged_on", ""))
    if (measured_at := evaluation.get("temperature", 1)) != 1:
        judged += f" Its samples were drawn at temperature {measured_at}."
    kept = [*evaluation["metrics"], *read_kept(run / LIKELIHOOD)["metrics"]]
    tables = metric_tables(kept)
    if VARIETY in tables:
        yield _variety_section(tables.pop(VARIETY), {row["name"]: row["value"] for row in kept}, judged)
    yield from more
    if tables:
        blocks = [
            Table(rows=FIGURES.in_words(rows), caption=f"{topic.title}. {topic.note}".rstrip())
            for topic, rows in tables.items()
        ]
        yield Section(title="Metrics", text=judged, blocks=blocks)


def _variety_section(rows: Sequence[Mapping[str, Any]], values: Mapping[str, Any], judged: str) -> Section:
    """What the metrics of variety mean in words, their table, and a plot over levels.

    rows: those of the topic, see `metric_tables`. values: all metrics by name. judged: which images judged the run.
    """
    endings = {"samples": "", "one half of the real images": "_real"}
    curves = {title: numbered(values, "variety_", ending) for title, ending in endings.items()}
    series = [Series(name=title, x=list(found), y=list(found.values())) for title, found in curves.items()]
    plot = Plot(title="variance within classes, relative to real images", x_label="level", series=series)
    blocks: list[Table | Plots] = [Table(rows=FIGURES.in_words(rows), caption=VARIETY.note)]
    if len(curves["samples"]) > 1:
        blocks.append(Plots(plots=[plot]))
    return Section(title="Variety", text=f"{variety_verdict(values)} {judged}".strip(), blocks=blocks)


def edits_section(edited: Sequence[Trajectory]) -> Section:
    """A card and a few rows of numbers for each edited trajectory, compared with its unedited original."""
    pairs = [(unedited(trajectory), trajectory) for trajectory in edited]
    rows = [
        {"edit": f"{after.class_name}, seed {after.seeds[0]}"} | {name: row[name] for name in COMPARED}
        for before, after in pairs
        for row in without_nan(compare(before, after, encode=encoder_of(after)))
    ]
    changes = [token_change(before.levels, after.levels).numpy() for before, after in pairs]
    most = max(float(change.max()) for change in changes)
    viewers = [_edit_card(*pair, change, most) for pair, change in zip(pairs, changes, strict=True)]
    cards = Gallery(viewers=viewers, start=-1)
    scale = Scale(
        name="Change of a token, 1 − cosine", low="0", high=f"{most:.3g}", colours=HEAT.astype(int).tolist()
    )
    table = Table(rows=FIGURES.in_words(rows), caption="Compared with the trajectory before its first edit.")
    return Section(title="Edits", text=EDITS_TEXT, blocks=[scale, cards, table])


def unedited(trajectory: Trajectory) -> Trajectory:
    """The trajectory before its first edit. Raises TrainerError if it was not edited."""
    if not trajectory.replaced:
        raise TrainerError(
            f"the trajectory of {trajectory.class_name} was not edited: give files that `trainer edit` or the studio "
            "wrote"
        )
    before = trajectory
    while before.replaced:
        before = before.undo()
    return before


def _edit_card(before: Trajectory, after: Trajectory, change: np.ndarray, most: float) -> LevelViewer:
    palette = shared_palette([before.levels.numpy()])
    is_decoded = before.can_decode and after.can_decode
    first, second = (
        each.decode() if is_decoded else latent_views(each.levels.numpy(), None, palette)[0].layers
        for each in (before, after)
    )
    layers = {"before": first, "after": second, "change": heat_map(change, most)}
    return LevelViewer(
        title=after.class_name,
        subtitle=f"seed {after.seeds[0]}",
        level_names=level_names(after.num_levels),
        captions=[f"change up to {each.max():.2g}" for each in change],
        views=[View(name=name, layers=pictures) for name, pictures in layers.items()],
        notes={"steps": len(after.history)},
    )


def read_sweep(path: Path) -> list[dict[str, Any]]:
    """The summary in a file that `trainer sweep --out` wrote. Raises TrainerError for any other file."""
    try:
        summary = parse_json(read_document(path))["summary"]
        if not summary or any(name not in row for row in summary for name in SETTING):
            raise KeyError("summary")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainerError(f"{path} is not what `trainer sweep --out` writes: {error!r}") from None
    return [{name: np.nan if value is None else value for name, value in row.items()} for row in summary]


def sweep_section(summary: Sequence[Mapping[str, Any]]) -> Section:
    """A plot over the measured levels for each edited level and measure, and the table of a sweep."""
    strongest = max(row["strength"] for row in summary)
    plots = []
    for level in sorted({row["level"] for row in summary}):
        rows = [row for row in summary if row["level"] == level and row["strength"] == strongest]
        for name, title in PLOTTED.items():
            if f"{name}_mean" in summary[0]:
                arms = dict.fromkeys(row["arm"] for row in rows)
                series = [_series([row for row in rows if row["arm"] == arm], name, arm) for arm in arms]
                where = f"{title}; level {level} edited"
                plots.append(Plot(title=where, x_label="measured level", series=series))
    table = Table(rows=table_in_words(summary), caption=BASELINES)
    return Section(title="Sweep of edits", text=SWEEP_TEXT, blocks=[Plots(plots=plots), table])


def _series(rows: Sequence[Mapping[str, Any]], name: str, arm: str) -> Series:
    mean, low, high = ([row[f"{name}_{part}"] for row in rows] for part in ("mean", "low", "high"))
    return Series(name=arm, x=[row["measured"] for row in rows], y=mean, low=low, high=high)


def likelihood_sections(run: Path, pipe: NormalizingPipeline, index: ShardIndex) -> list[Section]:
    """Maps of the most and the least surprising images of likelihood.json, measured again with the same noise.

    Returns nothing unless that file was written for these shards.
    """
    content = read_kept(run / LIKELIHOOD)
    if content.get("shards_hash") != index.config_hash:
        return []
    listed = content["images"]
    chosen = listed if len(listed) <= 2 * SHOWN_IMAGES else listed[:SHOWN_IMAGES] + listed[-SHOWN_IMAGES:]
    images = list(measure(pipe, index, [image["number"] for image in chosen], content["num_steps"]))
    # Added bits of tokens by level, or by transition where there is only one level: [N, L or T, H, W].
    has_levels = len(images[0].added) > 1
    maps = np.stack([image.added.sum(axis=1) if has_levels else image.added[0, ::-1] for image in images])
    count = maps.shape[1]
    names = level_names(count) if has_levels else [f"transition {k + 1}" for k in range(count)]
    peak = np.quantile(maps, 0.995, axis=(0, 2, 3)).clip(1e-9)
    cards = []
    with contextlib.closing(ShardReader(index)) as reader:
        for image, bits in zip(images, maps, strict=True):
            views = [View(name="added bits", layers=_bits_colours(bits / peak[:, None, None]))]
            if has_levels:
                views.insert(0, View(name=REGIONS, layers=hierarchy_colours(image.regions)))
            card = LevelViewer(
                title=index.class_names[image.label],
                subtitle=image.key,
                level_names=names,
                captions=[f"{total:,.0f} bits" for total in bits.sum(axis=(1, 2))],
                views=views,
                reveal=_photo(reader.read(image.number, extras=True).image),
                notes={"added bits": f"{image.added_total:,.0f}"},
            )
            cards.append(card)
    colours = _bits_colours(np.linspace(0, 1, SCALE_STEPS)).tolist()
    scales = [
        Scale(name=f"Added bits of a token, {name}", low="0", high=f"{most:.3g} or more", colours=colours)
        for name, most in zip(names, peak, strict=True)
    ]
    text = SURPRISE_TEXT.format(count=f"{len(listed):,}")
    return [Section(title="Surprise", text=text, blocks=[*scales, Gallery(viewers=cards, start=-1)])]


def _bits_colours(share: np.ndarray) -> np.ndarray:
    """Shares of the most bits as colours, uint8 [..., 3]; the root makes small differences visible."""
    return np.rint(PALE + np.sqrt(share.clip(0, 1))[..., None] * (DEEP - PALE)).astype(np.uint8)


def _photo(stored: bytes | None) -> np.ndarray | None:
    return None if stored is None else np.asarray(open_picture(stored).convert("RGB"))
