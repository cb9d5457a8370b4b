"""Samples per second of one reading process, against a loader in the style of the release, on the same samples.

    python -m benchmarks.trainer.loader

The release keeps one dict per sample in its tars, as `torch.save` pickles it: features float16 [C, H, W] and int16
region ids. Its dataset reads and unpickles a sample by its offset and makes float32 of it; its collate function
stacks, and turns channels last. Here the dict is unpickled with weights_only=True, which takes about 0.1 ms longer than
the release's unguarded call. Loaders take turns, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import records
from hierarchy_builder.records import Sample
from hierarchy_builder.store.shards import write_shard
from trainer.data.shards import ShardIndex
from trainer.data.stream import BatchDataset, StreamPlan, batch_loader
from trainer.data.tars import ShardEntry

NUM_LEVELS, NUM_CLASSES = 4, 1000
REGION_KEYS = ("objbg_ids", "parts_ids", "subparts_ids_global")


def main() -> None:
    options = make_parser().parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        loaders = prepare(Path(folder), options)
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for number in range(options.rounds + 1):
            for name, batches in loaders.items():
                rate = samples_per_second(batches(number))
                if number:  # the first round fills the page cache
                    rates[name].append(rate)
    base = statistics.median(rates["release style"])
    rows = []
    for name, values in rates.items():
        found = statistics.median(values)
        rows.append([name, f"{found:,.0f}", f"{found / base:.1f}"])
        print(
            f"{name:14} {found:7.0f} samples/s per worker (median of {len(values)}, "
            f"{min(values):.0f} to {max(values):.0f}), {found / base:.2f} times the release's style"
        )
    records.write(
        options.record,
        columns=["loader", "samples per second of one reader (median)", "ratio"],
        rows=rows,
        figures={"samples_per_second": rates},
    )


def prepare(folder: Path, options: argparse.Namespace) -> dict[str, Callable[[int], Iterable[int]]]:
    """Write the samples in all three ways; by name, what gives the sizes of the batches of one epoch."""
    samples = list(random_samples(options))
    shards = {"float16": samples, "int8": [quantised(sample) for sample in samples]}
    loaders = {"release style": release_style(folder / "release", samples, options)}
    for name, rows in shards.items():
        loaders[name] = streamed(folder / name, rows, options)
    return loaders


def samples_per_second(batch_sizes: Iterable[int]) -> float:
    """The rate of one epoch, start of the reading process not counted: from the first batch to the last."""
    sizes = iter(batch_sizes)
    next(sizes)
    start = time.perf_counter()
    return sum(sizes) / (time.perf_counter() - start)


def random_samples(options: argparse.Namespace) -> Iterator[Sample]:
    random = np.random.default_rng(0)
    shape = (options.grid, options.grid)
    for number in range(options.samples):
        yield Sample(
            key=f"class/{number:06d}",
            label=number % NUM_CLASSES,
            features=random.normal(size=(*shape, options.channels)).astype(np.float16),
            regions=random.integers(0, 9, (NUM_LEVELS - 1, *shape)).astype(np.uint8),
        )


def quantised(sample: Sample) -> Sample:
    """The same with int8 features, one scale for each token."""
    scale = np.abs(sample.features.astype(np.float32)).max(axis=-1, keepdims=True) / 127
    features = np.rint(sample.features / scale).astype(np.int8)
    return Sample(key=sample.key, label=sample.label, features=features, scale=scale, regions=sample.regions)


def streamed(
    folder: Path, samples: list[Sample], options: argparse.Namespace
) -> Callable[[int], Iterator[int]]:
    """This project's loader."""
    folder.mkdir()
    entries = []
    for number, rows in enumerate(per_tar(samples, options)):
        tar = folder / f"train-{number:06d}.tar"
        facts = write_shard(tar, rows, config_hash="")
        entries.append(
            ShardEntry(
                name=tar.name,
                num_samples=len(rows),
                num_bytes=facts["bytes"],
                sha256=facts["sha256"],
                folder=str(folder),
            )
        )
    index = ShardIndex(
        url=str(folder),
        name="benchmark",
        split="train",
        shards=tuple(entries),
        num_levels=NUM_LEVELS,
        grid=(options.grid, options.grid),
        width=options.channels,
        class_names=tuple(map(str, range(NUM_CLASSES))),
        encoder={},
        config_hash="",
    )
    plan = StreamPlan(
        shard_sizes=tuple(entry.num_samples for entry in entries),
        num_levels=NUM_LEVELS,
        batch_size=options.batch,
    )
    dataset = BatchDataset(index, plan, verify=False)
    per_epoch = options.samples // options.batch

    def batches(epoch: int) -> Iterator[int]:
        numbers = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        return (len(batch) for batch in batch_loader(dataset, numbers, workers=1))

    return batches


class ReleaseStyle(Dataset[tuple[Tensor, int, list[Tensor]]]):
    """Random access into tars of pickled dicts."""

    def __init__(self, places: list[tuple[Path, int, int]]) -> None:
        self.places = places
        self.files: dict[Path, io.BufferedReader] = {}

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> tuple[Tensor, int, list[Tensor]]:
        path, offset, size = self.places[number]
        if path not in self.files:
            self.files[path] = open(path, "rb")  # noqa: SIM115 (kept open)
        file = self.files[path]
        file.seek(offset)
        data = torch.load(io.BytesIO(file.read(size)), map_location="cpu", weights_only=True)
        return data["z"].to(torch.float32).contiguous(), data["label"], [data[key] for key in REGION_KEYS]


def release_collate(rows: list[tuple[Tensor, int, list[Tensor]]]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Stack, and channels first to channels last."""
    features, labels, regions = zip(*rows, strict=True)
    stacked = torch.stack(features).permute(0, 2, 3, 1).contiguous()
    return stacked, torch.tensor(labels), [torch.stack(level) for level in zip(*regions, strict=True)]


def release_style(
    folder: Path, samples: list[Sample], options: argparse.Namespace
) -> Callable[[int], Iterator[int]]:
    """The comparison."""
    folder.mkdir()
    places = []
    for number, rows in enumerate(per_tar(samples, options)):
        path = folder / f"{number:06d}.tar"
        with tarfile.open(path, "w") as tar:
            for sample in rows:
                data = pickled(sample)
                info = tarfile.TarInfo(f"{sample.key}.pt")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        with tarfile.open(path) as tar:
            places += [(path, info.offset_data, info.size) for info in tar]
    dataset = ReleaseStyle(places)

    def batches(epoch: int) -> Iterator[int]:
        order = np.random.default_rng(epoch).permutation(len(dataset)).tolist()
        loader = DataLoader(
            dataset,
            batch_size=options.batch,
            sampler=order,
            num_workers=1,
            collate_fn=release_collate,
            drop_last=True,
            prefetch_factor=2,
        )
        return (len(labels) for _, labels, _ in loader)

    return batches


def pickled(sample: Sample) -> bytes:
    """A sample as the release stores it."""
    channels_first = torch.from_numpy(sample.features).permute(2, 0, 1).contiguous()
    regions = zip(REGION_KEYS, torch.from_numpy(sample.regions).to(torch.int16).unbind(), strict=True)
    buffer = io.BytesIO()
    torch.save({"z": channels_first, "label": sample.label, **{k: v.clone() for k, v in regions}}, buffer)
    return buffer.getvalue()


def per_tar(samples: list[Sample], options: argparse.Namespace) -> Iterator[list[Sample]]:
    for first in range(0, len(samples), options.per_tar):
        yield samples[first : first + options.per_tar]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (("samples", 1024), ("per-tar", 128), ("batch", 64), ("grid", 16), ("channels", 768)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=5, help="Epochs timed.")
    parser.add_argument("--folder", help="Where the samples are written meanwhile. Default: the system's.")
    records.add_option(parser)
    return parser


if __name__ == "__main__":
    main()
