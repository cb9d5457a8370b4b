"""Options that name judges and their files, and `trainer evaluate --fdr`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hierarchy_builder.errors import UsageError
from hierarchy_builder.flags import grouped, option

if TYPE_CHECKING:
    from trainer.data.shards import ShardIndex
    from trainer.trajectories.pipeline import TrajectoryPipeline

NAMED_FILE = "NAME=FILE"
FILES = grouped(
    "Judges",
    judge_file=option("Weights of a judge. Default: those of the hub.", kind=list[str], metavar=NAMED_FILE),
    judge_reference=option(
        "Statistics of real images for a judge: npz of mu and sigma, or the .pkl of the release of FD-loss. "
        "Default: computed from the pictures in the shards.",
        kind=list[str],
        metavar=NAMED_FILE,
    ),
)
FDR = grouped(
    "Judges",
    fdr=option(
        "Measure instead how far decoded samples are from real pictures in the features of a judge, divided by how far "
        "validation images are. A judge is siglip, mae, inception, convnext, dinov2 or clip, `six` for all of these, "
        "an encoder that `hierarchy-builder encoders` lists, or module:function; may be given several times.",
        kind=list[str],
        metavar="NAME",
    ),
    **FILES,
)


def files_of(given: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The files that the options FILES name, by the field of the configuration, by judge."""
    return {
        f"{name}s": _named_files(f"--{name.replace('_', '-')}", given[name]) for name in FILES if given[name]
    }


def _named_files(flag: str, texts: Sequence[str]) -> dict[str, str]:
    """Files by name. Raises UsageError for another form than NAME=FILE, or a file that is not there."""
    found = {}
    for text in texts:
        name, equals, file = text.rpartition("=")
        if not (name and equals and file):
            raise UsageError(f"{flag} {text}: expected {NAMED_FILE}, for example mae=mae.safetensors")
        if not Path(file).is_file():
            raise UsageError(f"{flag} {text}: {file} does not exist, expected a file")
        found[name] = file
    return found


def measured(
    pipe: TrajectoryPipeline,
    index: ShardIndex,
    classes: Sequence[int],
    trained: Mapping[str, Any],
    given: Mapping[str, Any],
    **how: Any,
) -> list[dict[str, Any]]:
    """A row for each judge that `--fdr` names, and their mean ratio.

    trained: the configuration of the run. how: see `trainer.evaluation.fdr.ratios`.
    """
    from trainer.evaluation.fdr import ratios
    from trainer.post_training.judges import KNOWN, load_judges, parse_judges

    wanted = [each for name in given["fdr"] for each in (KNOWN if name == "six" else (name,))]
    files, device = files_of(given), next(pipe.model.parameters()).device
    judges = load_judges(
        wanted, files.get("judge_files", {}), files.get("judge_references", {}), device, differentiable=False
    )
    own = list(parse_judges((trained.get("post_training") or {}).get("judges", ())))
    rows = [each._asdict() for each in ratios(pipe, index, judges, classes, trained_on=own, **how)]
    if len(rows) > 1:
        mean = statistics.fmean(row["ratio"] for row in rows)
        is_trained = any(row["trained_on"] for row in rows)
        distances = dict.fromkeys(("frechet", "of_validation"))
        rows.append(rows[-1] | distances | {"judge": "mean", "ratio": mean, "trained_on": is_trained})
    return rows
