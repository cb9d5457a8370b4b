"""How well the cosine similarity of two tokens tells whether people put them into one segment.

    python -m benchmarks.builder.token_pairs IMAGES --masks LABELS --encoder dct --encoder onnx:FILE:OUTPUT

The first two label maps by people give each token the label of most of its cells. All pairs of tokens are ranked by
cosine similarity, map by map and, for `pooled`, all together: the area under the ROC curve is the chance that a pair
of one segment is more similar than a pair of two segments. ± is the standard error over photos.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from benchmarks import records
from hierarchy_builder.encoders import encode, load_encoder
from hierarchy_builder.images.decoding import crop_square, decode_image
from hierarchy_builder.images.masks import majority, open_masks
from hierarchy_builder.images.sources import open_source
from hierarchy_builder.quality.scores import cells_of

MAPS = 2


def pairs_of(tokens: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether two tokens have one label, bool [P], and their cosine similarity, float64 [P], of all pairs.

    tokens: [T, C]. labels: [T].
    """
    unit = tokens.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True).clip(1e-12)
    first, second = np.triu_indices(len(unit), 1)
    return labels[first] == labels[second], (unit @ unit.T)[first, second]


def areas(name: str, images: str, masks: Path, limit: int | None = None) -> tuple[np.ndarray, float, int]:
    """Areas of the photos, float64 [N], mean over their maps; the area of all pairs together; the number of tokens."""
    encoder, source, folder = load_encoder(name), open_source(images), open_masks(masks)
    single, same_all, similarity_all = [], [], []
    for record in source.records[:limit]:
        photo = decode_image(source.read(record.path))[0]
        tokens = encode(encoder, crop_square(photo, encoder.image_size_px)[None])[0]
        maps, _ = folder.read(record.path, photo.size, encoder.image_size_px, cells_of(encoder.grid))
        found = []
        for labels in maps[:MAPS]:
            same, similarity = pairs_of(
                tokens.reshape(-1, tokens.shape[-1]), majority(labels, encoder.grid).ravel()
            )
            if 0 < same.mean() < 1:
                found.append(roc_auc_score(same, similarity))
                same_all.append(same)
                similarity_all.append(similarity.astype(np.float32))
        if found:
            single.append(np.mean(found))
    pooled = roc_auc_score(np.concatenate(same_all), np.concatenate(similarity_all))
    return np.array(single), float(pooled), encoder.grid[0] * encoder.grid[1]


def main() -> None:
    options = make_parser().parse_args()
    columns = ["features", "photos", "tokens", "area, mean of photos", "area, pooled"]
    rows, figures = [], {}
    for name in options.encoder:
        single, pooled, tokens = areas(name, options.images, options.masks, options.limit)
        error = single.std(ddof=1) / np.sqrt(single.size)
        figures[name] = {"photos": single.tolist(), "pooled": pooled}
        mean = f"{single.mean():.3f} ± {error:.3f}"
        rows.append([f"`{name}`", str(single.size), str(tokens), mean, f"{pooled:.3f}"])
        print(" | ".join(rows[-1]), flush=True)
    records.write(options.record, columns=columns, rows=rows, figures=figures)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", help="folder, tar or listing of photos")
    parser.add_argument("--masks", type=Path, required=True, help="folder of <stem>_<k>.png")
    parser.add_argument("--encoder", action="append", required=True, help="repeat for more rows")
    parser.add_argument("--limit", type=int, help="photos taken, from the first")
    records.add_option(parser)
    return parser


if __name__ == "__main__":
    main()
