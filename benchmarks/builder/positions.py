"""How much the features of DINOv2 without registers depend on how its position embedding is resized to 16×16 tokens.

    python -m benchmarks.builder.positions BSDS/images --weights dinov2_small.safetensors --record positions

Compares `dinov2-small`, where timm antialiases, with `dinov2-original-small`, where it is done as in the authors' code,
on the same photographs and weights: the features, and the regions that the recipe `paper` makes of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import records
from hierarchy_builder.encoders import load_encoder
from hierarchy_builder.hierarchy import build_hierarchy
from hierarchy_builder.hierarchy.agreement import adjusted_rand
from hierarchy_builder.images.decoding import crop_square


def main() -> None:
    given = make_parser().parse_args()
    files = sorted(path for path in Path(given.photos).iterdir() if path.is_file())[: given.images]
    rows = []
    for blocks in ("", "@9"):
        features, regions = [], []
        for name in ("dinov2-small", "dinov2-original-small"):
            encoder = load_encoder(name + blocks, weights=given.weights, device="cpu")
            crops = [crop_square(Image.open(file).convert("RGB"), encoder.image_size_px) for file in files]
            features.append(np.concatenate([encoder.encode(crop[None]) for crop in crops]))
            regions.append(build_hierarchy(features[-1].astype(np.float16)).regions)
        ours, theirs = features
        cosines = (ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)
        agreements = [
            adjusted_rand(*(found[:, level] for found in regions)) for level in range(len(regions[0][0]))
        ]
        rows.append([
            f"`dinov2-small{blocks}`", str(len(files)), f"{np.sqrt(np.square(ours - theirs).mean()):.3f}",
            f"{cosines.mean():.4f}", f"{cosines.min():.3f}", *(f"{each.mean():.3f}" for each in agreements),
        ])  # fmt: skip
        print(*rows[-1], sep="\t", flush=True)
    columns = ["features", "photos", "difference, root mean square", "mean cosine", "least cosine"]
    columns += ["Rand index, object", "parts", "subparts"]
    records.write(given.record, columns=columns, rows=rows)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", help="a folder of photographs")
    parser.add_argument("--weights", required=True, help="weights of dinov2-small, with 37×37 positions")
    parser.add_argument("--images", type=int, default=100)
    records.add_option(parser)
    return parser


if __name__ == "__main__":
    main()
