"""Photographs → shards → small decoders with and without the perceptual loss → PSNR and LPIPS on held-out photographs.

    python -m benchmarks.trainer.decoders CALTECH --lpips LPIPS --encoder dct \
        --encoder dinov2-small@9=dinov2_small.safetensors --scratch FOLDER --record decoder_losses

CALTECH is a folder of class folders, LPIPS a folder with the weights of `trainer train-decoder --lpips`. A fifth of
the photographs, one shard of a shuffled build, is held out: no decoder is trained on it, and all figures are of it.
The metric LPIPS is the loss LPIPS, so it favours the decoders that were trained with it; PSNR favours the others.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import records
from benchmarks.trainer.tiny_model import run
from hierarchy_builder.terminal import stderr
from trainer.data.pictures import PictureDataset
from trainer.data.shards import ShardIndex, open_index
from trainer.data.stream import StreamPlan
from trainer.decode.perceptual import Lpips, load_lpips
from trainer.decode.rae import decoder_from_spec, load_decoder, to_uint8

SEED = 0


def main() -> None:
    given = make_parser().parse_args()
    lpips = load_lpips(given.lpips)
    rows: list[list[str]] = []
    figures: dict[str, object] = {}
    flat: list[str] = []
    for encoder in given.encoder:
        name, _, weights = encoder.partition("=")
        folder = Path(given.scratch) / name.replace(":", "-").replace("/", "-")
        index = open_index(str(built(given, name, weights, folder)))
        pictures, features = held_out(index, given.images, given.patch_size * index.grid[0])
        for has_loss in (False, True):
            seconds = train(given, folder, has_loss)
            decoded = decode(load_decoder(decoder_folder(folder, has_loss), index.encoder), features)
            scores = judged(decoded, pictures, lpips)
            figures[f"{name} {'with' if has_loss else 'without'}"] = {**scores, "seconds": seconds}
            rows.append([f"`{name}`", "L1 and LPIPS" if has_loss else "L1", *cells(scores), minutes(seconds)])
            stderr.print(*rows[-1], sep="\t", markup=False)
        if (inverse := decoder_from_spec(index.encoder.get("decoder"))) is not None:
            scores = judged(decode(inverse, features, pictures.shape[1]), pictures, lpips)
            rows.append([f"`{name}`", "its own inverse, nothing trained", *cells(scores), "—"])
        means = pictures.mean(axis=(1, 2), keepdims=True).round().astype(np.uint8)
        flat = cells(judged(np.broadcast_to(means, pictures.shape), pictures, lpips))
    rows.append(["—", "each photo's own mean colour", *flat, "—"])
    for row in rows:
        print(*row, sep="\t")
    columns = ["features", "losses of the decoder", "PSNR, dB", "LPIPS", "minutes"]
    records.write(given.record, columns=columns, rows=rows, seeds=[SEED], figures=figures)


def built(given: argparse.Namespace, name: str, weights: str, folder: Path) -> Path:
    """The shards of the photographs: all but a fifth in the first tar, the others in the second."""
    total = sum(1 for path in Path(given.photos).rglob("*") if path.is_file())
    line = ["hierarchy-builder", "build", given.photos, "--out", str(folder / "build"), "--encoder", name]
    line += ["--images", "--workers", "0", "--samples-per-shard", str(total * 4 // 5)]
    run([*line, *(["--weights", weights] if weights else [])])
    return folder / "build"


def decoder_folder(folder: Path, has_loss: bool) -> Path:
    return folder / ("decoder-lpips" if has_loss else "decoder-l1")


def train(given: argparse.Namespace, folder: Path, has_loss: bool) -> float:
    """Train one decoder on all shards but the last; the seconds it took."""
    out = decoder_folder(folder, has_loss)
    line = ["trainer", "train-decoder", str(folder / "build"), "--out", str(out), "--size", "tiny"]
    line += ["--total-images", str(given.total_images), "--seed", str(SEED), "--set", "held_out_shards=1"]
    line += ["--set", f"patch_size={given.patch_size}", "--batch-size", "8"]
    line += ["--set", "ema_halflife_kimg=0.1", "--quiet"]
    start = time.monotonic()
    run([*line, *(["--lpips", given.lpips] if has_loss else [])])
    took, record = time.monotonic() - start, out / "seconds.json"
    if not record.exists():  # a decoder that was trained before takes no time now
        record.write_text(json.dumps(took))
    return float(json.loads(record.read_text()))


def held_out(index: ShardIndex, images: int, side_px: int) -> tuple[np.ndarray, torch.Tensor]:
    """Photographs of the last shard, uint8 [N, h, w, 3], and their features [N, H, W, C]."""
    plan = StreamPlan(
        shard_sizes=tuple(shard.num_samples for shard in index.shards),
        num_levels=index.num_levels,
        batch_size=1,
    )
    first, last = index.num_samples - index.shards[-1].num_samples, index.num_samples - 1
    numbers = np.linspace(first, last, min(images, last + 1 - first)).round().astype(int).tolist()
    batch = PictureDataset(index, plan, (side_px, side_px)).samples(numbers)
    return batch.pictures.permute(0, 2, 3, 1).numpy(), batch.features.float()


@torch.no_grad()
def decode(decoder: torch.nn.Module, features: torch.Tensor, side_px: int | None = None) -> np.ndarray:
    """Pictures of features: uint8 [N, h, w, 3], brought to `side_px` where a decoder has a size of its own."""
    parts = []
    for rows in features.split(16):
        drawn = decoder(rows)
        if side_px is not None and side_px != drawn.shape[-1]:
            drawn = torch.nn.functional.interpolate(drawn, (side_px, side_px), mode="bicubic", antialias=True)
        parts.append(to_uint8(drawn))
    return torch.cat(parts).numpy()


@torch.no_grad()
def judged(decoded: np.ndarray, pictures: np.ndarray, lpips: Lpips) -> dict[str, tuple[float, float]]:
    """Mean and standard error over photographs of PSNR in dB (higher is better) and of LPIPS (lower is better)."""
    a, b = (torch.from_numpy(x.copy()).permute(0, 3, 1, 2).float() / 255 for x in (decoded, pictures))
    squares = (a - b).square().mean(dim=(1, 2, 3)).clamp_min(1e-10)
    distances = torch.cat([lpips(x, y) for x, y in zip(a.split(8), b.split(8), strict=True)])
    return {"psnr": over_photos(-10 * squares.log10()), "lpips": over_photos(distances)}


def over_photos(values: torch.Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def cells(scores: dict[str, tuple[float, float]]) -> list[str]:
    (psnr, psnr_error), (distance, error) = scores["psnr"], scores["lpips"]
    return [f"{psnr:.2f} ± {psnr_error:.2f}", f"{distance:.3f} ± {error:.3f}"]


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", help="a folder of class folders")
    parser.add_argument("--lpips", required=True, help="folder with the weights vgg16 and lpips")
    parser.add_argument("--encoder", action="append", required=True, help="NAME or NAME=WEIGHTS; repeatable")
    parser.add_argument("--total-images", type=int, default=1_600, help="images each decoder sees")
    parser.add_argument("--patch-size", type=int, default=8, help="pixels per side that a token decodes to")
    parser.add_argument("--images", type=int, default=128, help="held-out photographs that judge")
    parser.add_argument(
        "--scratch", required=True, help="folder of builds and decoders, kept; a repeat resumes"
    )
    records.add_option(parser)
    return parser


if __name__ == "__main__":
    main()
