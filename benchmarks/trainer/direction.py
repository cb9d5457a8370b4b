"""What a cheaper direction of the derivative costs: the loss of Trajectory Forcing without its pass at h = 0.

    python -m benchmarks.trainer.direction --record direction

The loss takes du/dt along v at h = t − r = 0, which the v-head gives in a pass of its own: 68.8 of the 450.6 GFLOP of
a training image of TF-B. Two directions come without that pass, and are other numbers:

    data    e − x of the sample itself, as in MeanFlow: right on average over the samples that share z, noisy in each
    head    what the v-head of the other pass says, which sees h = t − r instead of 0

On the release's small network and its golden batch: relative differences to the default, norms over norms. On the ring
of 8 modes of the tests, after 600 steps of 128 points with seeds 0 and 1: modes that one-step samples find, their
variance relative to real points, and the energy distance from real points.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import records

for folder in ("tests/support", "tests/trainer/methods/trajectory_forcing"):
    sys.path.append(str(records.ROOT / folder))

import test_known_distributions as toy  # noqa: E402
from released import GOLDEN, golden_arrays, with_averages  # noqa: E402

from trainer.methods.trajectory_forcing import objective  # noqa: E402
from trainer.methods.trajectory_forcing.release import load_checkpoint  # noqa: E402

EXACT = objective._directions
Directions = Callable[..., tuple[Tensor, Tensor]]


def of_data(model: Any, z: Tensor, v_t: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """The direction e − x of the sample."""
    return v_t, v_t


def of_head(
    model: Any, z: Tensor, v_t: Tensor, t: Tensor, r: Tensor, guidance: None, inputs: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """What the v-head says with the h of the sample."""
    return model(z, t=t, r=r, heads="v", guidance=guidance, **inputs).v, v_t


WAYS: dict[str, tuple[str, Directions]] = {
    "exact": ("v-head at h = 0 (the loss)", EXACT),
    "data": ("e − x of the sample", of_data),
    "head": ("v-head at h = t − r", of_head),
}


def golden_terms(directions: Directions) -> dict[str, Tensor]:
    """Terms of the golden batch and the gradient of its loss, flat."""
    arrays = golden_arrays(GOLDEN / "tf_tiny" / "loss.npz")
    with tempfile.TemporaryDirectory() as folder:
        stored = gzip.decompress((GOLDEN / "tf_tiny" / "checkpoint_1234.gz").read_bytes())
        (Path(folder) / "checkpoint").write_bytes(with_averages(stored))
        model = load_checkpoint(Path(folder) / "checkpoint", GOLDEN / "tf_tiny" / "config.json")
    objective._directions = directions  # type: ignore[assignment]
    terms = objective.loss(
        model,
        arrays["clean"],
        label=arrays["y"],
        regions=arrays["region_ids"],
        **{name: arrays[name] for name in ("prev", "level", "t", "r", "noise")},
    )
    terms["loss"].backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return {**{name: value.detach() for name, value in terms.items()}, "gradient": gradient}


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2·E‖a − b‖ − E‖a − a'‖ − E‖b − b'‖ of two sets of points."""
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def on_the_ring(directions: Directions, seed: int) -> dict[str, float]:
    """Train on the ring of 8 modes, and judge one-step samples."""
    objective._directions = directions  # type: ignore[assignment]
    plain = torch.manual_seed
    torch.manual_seed = lambda number: plain(number + seed)  # type: ignore[assignment]
    try:
        points = toy.drawn(toy.trained(toy.one_ring))[:, 0]
    finally:
        torch.manual_seed = plain
    real = toy.ring(toy.SAMPLES, torch.Generator().manual_seed(3))
    return {
        "modes": toy.modes_found(points),
        "variance": toy.variance_ratio(points, real),
        "energy": energy_distance(points, real),
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    records.add_option(parser)
    parser.add_argument("--seeds", type=int, default=2)
    return parser


def main() -> None:
    options = make_parser().parse_args()
    exact, rows, figures = golden_terms(EXACT), [], {}
    real = [toy.ring(toy.SAMPLES, torch.Generator().manual_seed(seed)) for seed in (3, 4)]
    for name, (words, directions) in WAYS.items():
        terms = golden_terms(directions)
        away = float((terms["gradient"] - exact["gradient"]).norm() / exact["gradient"].norm())
        squares = float(terms["raw_mse_u"] / exact["raw_mse_u"])
        found = [on_the_ring(directions, seed) for seed in range(options.seeds)]
        figures[name] = {"gradient": away, "raw_mse_u": squares, "ring": found}
        rows.append(
            [
                words,
                "450.6" if name == "exact" else "381.8",
                f"{away:.3g}",
                f"{squares:.4g}",
                *(", ".join(f"{each[key]:.3g}" for each in found) for key in ("modes", "variance", "energy")),
            ]
        )
        print(json.dumps(figures[name]), flush=True)
    objective._directions = EXACT
    rows.append(
        [
            "real points against others",
            "",
            "",
            "",
            "8",
            f"{toy.variance_ratio(*real):.3g}",
            f"{energy_distance(*real):.2g}",
        ]
    )
    records.write(
        options.record,
        columns=[
            "direction",
            "GFLOP, TF-B",
            "change of the gradient",
            "raw_mse_u, relative",
            "modes of 8",
            "variance",
            "energy distance",
        ],
        rows=rows,
        figures=figures,
        seeds=list(range(options.seeds)),
    )


if __name__ == "__main__":
    main()
