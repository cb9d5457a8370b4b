"""How well a run of Latent Forcing draws pictures of given canvases, level by level, beside each picture's mean colour.

    python -m benchmarks.trainer.pixel_stage RUN SHARDS [--images 24] [--steps 8]

RUN was trained with `--pixel-stage` on SHARDS, which were built with `--images`; images are spread evenly over them.
Picture ℓ is drawn given the teacher's levels 0 to ℓ and the class, seed 0.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from benchmarks import records
from trainer.data.pictures import PictureDataset
from trainer.data.shards import open_index
from trainer.data.stream import StreamPlan
from trainer.decode.rae import to_uint8
from trainer.methods.latent_forcing.pipeline import LatentPipeline
from trainer.metrics.reconstruction import reconstruction


def main() -> None:
    """Print a row of scores for every level."""
    given = make_parser().parse_args()
    index = open_index(given.shards)
    pipe = LatentPipeline.from_pretrained(given.run)
    sizes = tuple(shard.num_samples for shard in index.shards)
    plan = StreamPlan(shard_sizes=sizes, num_levels=index.num_levels, batch_size=1)
    data = PictureDataset(index, plan, pipe.model.config.image_px)
    batch = data.samples(np.linspace(0, index.num_samples - 1, given.images).astype(int).tolist())
    normaliser = pipe.normaliser.to("cpu")
    canvases = normaliser.teacher_canvases(batch.features.float(), batch.regions)
    stage = pipe.pixel_stage(given.steps)
    drawn = [stage.of(label, 0)(levels) for label, levels in zip(batch.label.tolist(), canvases, strict=True)]
    pictures = (
        to_uint8(torch.cat(drawn))
        .cpu()
        .numpy()
        .reshape(given.images, index.num_levels, *batch.pictures.shape[2:], 3)
    )
    truth = batch.pictures.permute(0, 2, 3, 1).numpy()
    rows = []
    for level in range(index.num_levels):
        scores = reconstruction(pictures[:, level], truth)
        print(f"level {level}", *(f"{name} {value:.3f}" for name, value in scores))
        rows.append([f"0 to {level}", *(f"{value:.3f}" for _, value in scores)])
    columns = ["levels given", *(name for name, _ in scores)]
    records.write(given.record, columns=columns, rows=rows, seeds=[0])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("shards")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--steps", type=int, default=8)
    records.add_option(parser)
    return parser


if __name__ == "__main__":
    main()
