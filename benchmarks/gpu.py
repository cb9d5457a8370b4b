"""Every figure of one GPU in one call, beside the value that was predicted for it.

    python -m benchmarks.gpu --out FOLDER --minutes 25     the same call again goes on with what is missing
    python -m benchmarks.gpu --out FOLDER --record         the table of docs/results.md from the figures in FOLDER
    python -m benchmarks.gpu --out FOLDER --device cpu --tiny      a rehearsal without a GPU

A section runs in a process of its own with a time limit, and appends each figure to FOLDER/figures.jsonl as soon as it
is known, so that a crash or a hang costs one section. Sections come in the order of their worth. Speeds are medians
over repeated calls after a warm-up; weights are random, since they do not change a speed. FOLDER also keeps profiles
of a training step, the encoder, samples, k-means and a distance (`*.trace.json`, for chrome://tracing or Perfetto).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import io
import json
import multiprocessing
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import records

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = (
    "1"  # a library that asks for devices must not open one before the forks
)
import torch
from PIL import Image
from torch import Tensor

# A bare machine may lack a library: then the sections that need it fail, each with its reason, and the others run.
try:
    from hierarchy_builder.canvases import level_canvases
    from trainer.data.shards import open_index
    from trainer.data.stream import BatchDataset, StreamPlan, batch_loader
    from trainer.decode.rae import RaeDecoder, RaeDecoderConfig
    from trainer.methods.trajectory_forcing import objective
    from trainer.methods.trajectory_forcing.config import MethodConfig
    from trainer.methods.trajectory_forcing.network import TrajectoryTransformer
    from trainer.methods.trajectory_forcing.presets import PRESETS
    from trainer.methods.trajectory_forcing.sample import sample_levels
    from trainer.post_training.distance import Target
    from trainer.seeds import StepRows
    from trainer.training.config import OptimConfig
    from trainer.training.method_run import compiled
    from trainer.training.optim import MuonAdam, orthogonalise
    from trainer.training.speed import counted_flops
    from trainer.training.weights import WeightAverages
except ImportError as error:
    print(f"without the trainer: {error}")
try:
    from hierarchy_builder.encoders import Encoder, encode, load_encoder
    from hierarchy_builder.hierarchy import build_hierarchy
    from hierarchy_builder.vocabulary import kmeans
except ImportError as error:
    print(f"without the builder: {error}")

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("float32", "tf32", "bfloat16")


class Predicted(NamedTuple):
    """A value that was calculated before any measurement, and how."""

    value: float
    unit: str
    formula: str


BF16, TF32, F32, MEMORY, COPY = 525.0, 330.0, 52.0, 4.3, 50.0
"""Rates of an H200 that predictions assume: TFLOP/s of products at this network's shapes (data sheet: 989 dense
bfloat16), TB/s of memory (data sheet: 4.8), GB/s of page-locked copies."""
STEP_GFLOP = {"TF-B": 450.6, "TF-L": 1382.0, "TF-H": 3057.0}
"""Of one training image: `torch.utils.flop_counter` over loss and backward; section `counts` counts again."""


def _rate(gflop: float, gigabytes: float, tflops: float = BF16, unit: str = "images/s") -> Predicted:
    """Images per second if products and traffic to memory follow one another."""
    seconds = gflop / (tflops * 1e3) + gigabytes / (MEMORY * 1e3)
    formula = f"1 / ({gflop:g} GFLOP / {tflops:g} TFLOP/s + {gigabytes:g} GB / {MEMORY:g} TB/s)"
    return Predicted(1 / seconds, unit, formula)


def _milliseconds(gflop: float, tflops: float) -> Predicted:
    return Predicted(gflop / tflops, "ms", f"{gflop:g} GFLOP / {tflops:g} TFLOP/s")


PREDICTED = {
    "parity: parameters without a gradient": Predicted(0, "", "every trained weight has a gradient"),
    "parity: gradients, largest relative difference, float32": Predicted(1e-4, "", "float32 in another order"),
    "parity: gradients, largest relative difference, bfloat16": Predicted(0.05, "", "8 bits of mantissa"),
    "parity: tokens in other regions": Predicted(0, "share", "computed on the CPU wherever the features are"),
    "roof: product 8192 bfloat16": Predicted(780, "TFLOP/s", "0.79 of the 989 in the data sheet"),
    "roof: product of TF-B bfloat16": Predicted(BF16, "TFLOP/s", "assumed by every other prediction"),
    "roof: copy in memory": Predicted(MEMORY, "TB/s", "0.9 of the 4.8 in the data sheet"),
    "counts: loss and backward pass": Predicted(450.6, "GFLOP", "68.8 + 177.0 + 204.8"),
    "counts: direction of the derivative (v-head only, r = t)": Predicted(68.8, "GFLOP", "an earlier count"),
    "counts: forward pass with derivative": Predicted(177.0, "GFLOP", "an earlier count"),
    "counts: backward pass": Predicted(204.8, "GFLOP", "an earlier count"),
    "counts: forward pass alone": Predicted(103.0, "GFLOP", "an earlier count"),
    "counts: loss": Predicted(245.8, "GFLOP", "68.8 + 177.0"),
    "step: TF-B float32 eager, 32 images": _rate(450.6, 8.5, F32),
    "step: TF-B tf32 eager, 32 images": _rate(450.6, 8.5, TF32),
    "step: TF-B bfloat16 eager, 64 images": _rate(450.6, 7.1),
    "step: TF-B bfloat16 compiled, 64 images": _rate(450.6, 3.07),
    "step: TF-B bfloat16 compiled, 256 images": _rate(450.6, 1.9),
    "step: TF-B bfloat16 compiled, peak memory of 256 images": Predicted(
        110, "GiB", "(256 × 0.456 GB saved for backward + 4.2 GB of weights) / 1.074; at most, eager"
    ),
    "update: TF-B Newton–Schulz float32": _milliseconds(3460, F32),
    "update: TF-B Newton–Schulz tf32": _milliseconds(3460, TF32),
    "update: TF-B Newton–Schulz bfloat16": _milliseconds(3460, BF16),
    "encoder: DINOv2-B bfloat16 eager, 128 images": _rate(47.1, 0.29),
    "encoder: DINOv2-B bfloat16 compiled, 128 images": _rate(47.1, 0.15),
    "encoder: DINOv2-B encode() to float16 in memory, 128 images": Predicted(
        1 / (1 / 5900 + 0.15e-3 / 50 + 0.39e-3 / 50), "images/s", "forward, then 0.15 MB in and 0.39 MB out at 50 GB/s"
    ),
    "large: TF-L bfloat16 eager, 32 images": _rate(1382, 16),
    "large: TF-H bfloat16 eager, 16 images": _rate(3057, 32),
    "sample: 4 levels, bfloat16, 256 at once": Predicted(
        275 / BF16, "ms each", "4 levels × 68.8 GFLOP / 525 TFLOP/s"
    ),
    "sample: RAE ViT-XL, bfloat16, 256 at once": Predicted(221.6 / BF16, "ms each", "221.6 GFLOP / 525 TFLOP/s"),
    "loader: 4 threads to the device": Predicted(20_000, "samples/s", "4 × 7,100 of one thread, less contention"),
    "kmeans: torch, one iteration of 262,144 × 768, 4,096 centroids": Predicted(
        0.1, "s", "1.65 TFLOP / 52 TFLOP/s + 403 MB pageable at 6 GB/s"
    ),
}  # fmt: skip
"""By name of the figure; the loops below add those of every size and kind, and texts such as the card have none."""
RATES = {"float32": F32, "tf32": TF32, "bfloat16": BF16}


def _predict_the_rest() -> None:
    """Add the figures that differ from one in `PREDICTED` by a size, a kind of arithmetic or a number of threads."""

    def add(name: str, value: float, unit: str, formula: str) -> None:
        PREDICTED.setdefault(name, Predicted(value, unit, formula))

    for name in ("samples of 4 levels", "decoder"):
        add(f"parity: {name}", 1e-4, "", "float32 in another order")
    add("parity: canvases", 1e-6, "", "float32 sums in the same order")
    add("parity: int8 features", 0, "", "one product of each number, rounded alike")
    add(
        "parity: tokens in other clusters of k-means",
        1,
        "",
        "float32 products in another order, 1,024 tokens",
    )
    for shape in ("of TF-B", "of TF-L", "of TF-L, padded", "of TF-H", "of TF-H, padded", "8192"):
        for kind, tflops in RATES.items():
            is_odd = shape in ("of TF-L", "of TF-H") and kind != "float32"
            formula = "half of the padded shape: a guess" if is_odd else f"assumed for {kind}"
            add(f"roof: product {shape} {kind}", tflops / (2 if is_odd else 1), "TFLOP/s", formula)
    add("roof: copy to page-locked memory", COPY, "GB/s", "PCIe 5 with 16 lanes, 63 GB/s in the data sheet")
    kept = {"float32": 0.763, "tf32": 0.763, "bfloat16": 0.456}
    for kind, images, how in (
        *(("bfloat16", images, "eager") for images in (64, 256, 1024)),
        *(("float32", 32, "eager"), ("tf32", 32, "eager"), ("bfloat16", 64, "compiled")),
    ):
        add(f"step: TF-B {kind} {how}, {images} images", *_rate(450.6, 7.1))
        memory = (images * kept[kind] + 4.2) / 1.074
        most = "; more than the card has, so it fails" if memory > 131 else "; at most, eager"
        formula = f"({images} × {kept[kind]} GB + 4.2 GB) / 1.074{most}"
        add(f"step: TF-B {kind} {how}, peak memory of {images} images", memory, "GiB", formula)
    for name, images, each, weights in (("TF-L", 32, 1.069, 12), ("TF-H", 16, 1.9, 27)):
        formula = f"({images} × {each} GB + {weights} GB) / 1.074"
        memory = (images * each + weights) / 1.074
        add(f"large: {name} bfloat16 eager, peak memory of {images} images", memory, "GiB", formula)
    add(
        "update: TF-B whole optimiser step",
        70,
        "ms",
        "66.5 ms of Newton–Schulz in float32 + 13 GB / 4.3 TB/s",
    )
    add("update: TF-B three weight averages", 1.5, "ms", "3 × 174 M × 12 bytes / 4.3 TB/s")
    add("update: forward with derivative, over forward", 177 / 103, "times", "177.0 / 103 GFLOP")
    for how, rate in (("false", 390), ("true", 690)):
        add(
            f"fit: trainer train, compile={how}",
            rate,
            "images/s",
            "the step at 128 images, and 20 ms of each update",
        )
    add(
        "fit: trainer post-train, 512 images a step",
        300,
        "images/s",
        "1 / (4 × 275 GFLOP / 525 TFLOP/s + 8 distances of 80 ms / 512), drawn twice",
    )
    for size, gflop, traffic in (("B", 47.1, 0.29), ("L", 162.0, 0.78)):
        for images in (32, 128, 256, 512):
            rate = _rate(gflop, traffic)
            add(f"encoder: DINOv2-{size} bfloat16 eager, {images} images", *rate)
            host = 0.54e-3 if size == "B" else 0.67e-3
            formula = f"{rate.formula}, and {host * 1e3:.2g} MB of copies at {COPY:g} GB/s"
            name = f"encoder: DINOv2-{size} encode() to float16 in memory, {images} images"
            add(name, 1 / (1 / rate.value + host / COPY), "images/s", formula)
        add(f"encoder: DINOv2-{size} bfloat16 compiled, 128 images", *_rate(gflop, traffic / 2))
    for workers in (1, 2, 4, 6):
        rate = _modelled(f"{workers} workers")
        add(
            f"build: images → shards, {workers} workers",
            rate,
            "images/s",
            "benchmarks/builder/builder_model.py",
        )
    add(
        "build: images → shards, 4 workers, in stages",
        1500,
        "images/s",
        "16 cores / (5.3 + 1.1 + read again) ms, a guess",
    )
    add("hierarchy: 1 cores", 926, "images/s", "1 / 1.08 ms")
    add("hierarchy: 16 cores", 12_400, "images/s", "16 / 1.29 ms")
    for dtype, tflops in (("float32", F32), ("float64", 60)):
        formula = f"0.10 GFLOP / {tflops:g} TFLOP/s"
        add(f"hierarchy: Gram matrices on the device, torch.{dtype}", 1e5 / tflops / 1e3, "µs each", formula)
    for threads, rate in ((1, 7_100), (2, 13_000), (8, 25_000)):
        add(
            f"loader: {threads} threads to the device",
            rate,
            "samples/s",
            "7,100 of one thread, less contention",
        )
    for kind, tflops in RATES.items():
        for images in (1, 32, 256):
            for what, gflop, least in (("4 levels", 275.0, 15.0), ("RAE ViT-XL", 221.6, 8.0)):
                formula = f"{gflop:g} GFLOP / {tflops:g} TFLOP/s, at least {least:g} ms of launches together"
                value = max(gflop / tflops, least / images)
                add(f"sample: {what}, {kind}, {images} at once", value, "ms each", formula)
    add("jpeg: nvImageCodec, 128 at once", 10_000, "images/s", "engines of the card for JPEG, a guess")
    add("jpeg: nvImageCodec, mean difference of a value", 0.3, "", "another rounding of each value, a guess")
    for package, seconds in (("faiss", 1.8), ("cuml", 0.5), ("flash_kmeans", 0.4)):
        formula = "16.5 TFLOP / 52 TFLOP/s and a copy" + (", sums on one core" if package == "faiss" else "")
        add(f"kmeans: {package}, ten iterations of the same", seconds, "s", formula)
    for width, value in ((768, 80), (2048, 500)):
        add(
            f"post_training: distance at width {width}",
            value,
            "ms",
            "one eigen-decomposition in float64, a guess",
        )


def _modelled(name: str) -> float:
    """Images per second that the queueing model gives, from its record."""
    path = records.RECORDS / "builder_model.json"
    if not path.exists():  # the model draws its photographs with this script
        return float("nan")
    record = json.loads(path.read_text())
    return float(record["figures"]["rates"][name]["images_per_second"])


_predict_the_rest()


class Bench:
    """Where a section measures, and where its figures go."""

    def __init__(self, out: Path, device: str, tiny: bool) -> None:
        self.out, self.device, self.tiny = out, torch.device(device), tiny
        self.is_cuda = self.device.type == "cuda"

    def note(self, name: str, value: float | str | bool, unit: str = "", **more: Any) -> None:
        """Append one figure to the file, and print it."""
        predicted = None if self.tiny else PREDICTED.get(name)
        row = {"name": name, "value": value, "unit": unit, **more, "time": round(time.time())}
        row["is_predicted"] = name in PREDICTED
        if predicted:
            row |= {"predicted": predicted.value, "formula": predicted.formula}
        with open(self.out / "figures.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        beside = f"   predicted {predicted.value:.4g}" if predicted else ""
        print(f"{name:<72} {_shown(value)} {unit}{beside}", flush=True)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Note the reason where a measurement fails, for example for want of memory, and go on."""
        try:
            yield
        except Exception as error:  # one figure is lost, and its reason is a figure too
            self.note(name, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        if self.is_cuda:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Wait until the device has done all that was asked."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any], repeats: int = 7) -> float:
        """Median seconds of a call, after two calls that are not counted."""
        found = []
        for _ in range(2 if self.tiny else repeats + 2):
            start = time.perf_counter()
            call()
            self.wait()
            found.append(time.perf_counter() - start)
        return statistics.median(found[1 if self.tiny else 2 :])

    def size(self, full: int, tiny: int) -> int:
        """`full`, or `tiny` in a rehearsal."""
        return tiny if self.tiny else full

    def profile(self, name: str, call: Callable[[], Any]) -> None:
        """Write a trace of one call, and a table of what took most of its time."""
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.is_cuda else [])]
        with self.attempt(f"profile of {name}"):
            with profile(activities=activities) as found:
                call()
                self.wait()
            found.export_chrome_trace(str(self.out / f"{name}.trace.json"))
            order = f"self_{self.device.type}_time_total"
            (self.out / f"{name}.txt").write_text(found.key_averages().table(sort_by=order, row_limit=30))


@contextmanager
def arithmetic(device: torch.device, kind: str) -> Iterator[None]:
    """Compute in float32, in TF32 inside products, or in bfloat16 as the trainer's autocast does."""
    torch.set_float32_matmul_precision("highest" if kind == "float32" else "high")
    with torch.autocast(device.type, torch.bfloat16, enabled=kind == "bfloat16"):
        yield
    torch.set_float32_matmul_precision("highest")


# ---------------------------------------------------------------- is it right


def parity(bench: Bench) -> None:
    """Compare every path on the device with the CPU in float32, where golden tests hold."""
    gradients = {}
    for place, kind in (("cpu", "float32"), (bench.device, "float32"), (bench.device, "bfloat16")):
        device = torch.device(place)
        model, batch = small_network(device), canvases(small_network("cpu"), 4, device)
        with arithmetic(device, kind):
            terms = objective.loss(model, **batch)
        terms["loss"].backward()
        gradients[device.type, kind, len(gradients)] = {
            name: None if p.grad is None else p.grad.cpu() for name, p in model.named_parameters()
        }
    own, *others = gradients.items()
    for (_, kind, _), found in others:
        missing = sum(found[name] is None for name, g in own[1].items() if g is not None)
        if kind == "bfloat16":
            bench.note("parity: parameters without a gradient", missing)
        worst = max(difference(found[name], g) for name, g in own[1].items() if g is not None)
        bench.note(f"parity: gradients, largest relative difference, {kind}", worst)
    label, noise = torch.arange(2), torch.randn(4, 2, *small_network("cpu").config.grid, 32)
    with torch.no_grad():
        found = [
            sample_levels(small_network(place).eval(), label.to(place), noise.to(place)).cpu()
            for place in ("cpu", bench.device)
        ]
    bench.note("parity: samples of 4 levels", difference(found[1], found[0]))
    torch.manual_seed(0)
    decoder, tokens = (
        RaeDecoder(RaeDecoderConfig.of_size("tiny", 32, 16, 16)).eval(),
        torch.randn(1, 16, 16, 32),
    )
    with torch.no_grad():
        picture = decoder(tokens)
        bench.note(
            "parity: decoder", difference(decoder.to(bench.device)(tokens.to(bench.device)).cpu(), picture)
        )
    codes, scale = (
        torch.randint(-127, 128, (2, 16, 16, 32), dtype=torch.int8),
        torch.rand(2, 16, 16, 1).half(),
    )
    unpacked = codes.to(bench.device).float() * scale.to(bench.device).float()
    bench.note("parity: int8 features", difference(unpacked.cpu(), codes.float() * scale.float()))
    with bench.attempt("parity: hierarchies"):
        features = torch.randn(4, 16, 16, 32, generator=torch.Generator().manual_seed(0)).half()
        on_cpu, on_device = build_hierarchy(features), build_hierarchy(features.to(bench.device))
        bench.note(
            "parity: tokens in other regions", float((on_cpu.regions != on_device.regions).mean()), "share"
        )
        regions = torch.from_numpy(on_cpu.regions)
        drawn = level_canvases(features.to(bench.device), regions.to(bench.device)).cpu()
        bench.note("parity: canvases", difference(drawn, level_canvases(features, regions)))
        rows, centroids = features.flatten(0, 2).numpy(), features.flatten(0, 2)[:8].float().numpy()
        sums = kmeans.sum_clusters(rows, centroids)  # on CUDA where there is one
        counts = np.bincount(kmeans.nearest_prototype(rows, centroids)[0], minlength=8)
        bench.note("parity: tokens in other clusters of k-means", int(abs(counts - sums.counts).sum()) // 2)


def difference(found: Tensor | None, expected: Tensor) -> float:
    """Norm of the difference, relative to the norm of what is expected; infinite where nothing was found."""
    if found is None:
        return float("inf")
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


# ---------------------------------------------------------------- what the card can do


def roof(bench: Bench) -> None:
    """Speeds of the card itself, to which all others are compared."""
    device = bench.device
    if bench.is_cuda:
        found = torch.cuda.get_device_properties(0)
        bench.note(
            "roof: card",
            f"{found.name}, {found.total_memory / 2**30:.0f} GiB, {found.multi_processor_count} SM",
        )
    rows = bench.size(128 * 280, 64)
    shapes = {
        "of TF-B": (rows, 768, 2048),
        "of TF-L": (rows, 1024, 2730),
        "of TF-L, padded": (rows, 1024, 2752),
    }
    shapes |= {"of TF-H": (rows, 1280, 3413), "of TF-H, padded": (rows, 1280, 3456)}
    shapes |= {"8192": (bench.size(8192, 64),) * 3}
    for name, (m, k, n) in shapes.items():
        for kind in KINDS:
            dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
            x, w = (
                torch.randn(m, k, device=device, dtype=dtype),
                torch.randn(n, k, device=device, dtype=dtype),
            )
            torch.set_float32_matmul_precision("highest" if kind == "float32" else "high")
            seconds = bench.seconds(lambda x=x, w=w: torch.nn.functional.linear(x, w))
            bench.note(f"roof: product {name} {kind}", 2 * m * k * n / seconds / 1e12, "TFLOP/s")
    a = torch.empty(bench.size(2**30, 2**16), device=device)
    b, on_host = torch.empty_like(a), torch.empty(bench.size(2**26, 2**16), pin_memory=bench.is_cuda)
    bench.note("roof: copy in memory", 8 * a.numel() / bench.seconds(lambda: b.copy_(a)) / 1e12, "TB/s")
    part = a[: on_host.numel()]
    seconds = bench.seconds(lambda: on_host.copy_(part, non_blocking=True))
    bench.note("roof: copy to page-locked memory", 4 * on_host.numel() / seconds / 1e9, "GB/s")


# ---------------------------------------------------------------- training


def step(bench: Bench) -> None:
    """Forward and backward of TF-B as it is written, per arithmetic."""
    model = network(bench, "TF-B")
    for kind, images in (
        ("bfloat16", 64),
        ("float32", 32),
        ("tf32", 32),
        ("bfloat16", 256),
        ("bfloat16", 1024),
    ):
        timed_step(bench, "step: TF-B", model, STEP_GFLOP["TF-B"], kind, False, images)


def compile_step(bench: Bench) -> None:
    """The same compiled, which takes minutes for each number of images."""
    model = network(bench, "TF-B")
    for images in () if bench.tiny else (256, 64):
        timed_step(bench, "step: TF-B", model, STEP_GFLOP["TF-B"], "bfloat16", True, images)


def counts(bench: Bench) -> None:
    """Operations of one training image of TF-B by what they are for; the same on every device."""
    model = network(bench, "TF-B")
    batch = canvases(model, 1, bench.device)
    z, inputs = batch["x"], {name: batch[name] for name in ("t", "r", "label", "level", "prev")}

    def note(name: str, call: Callable[[], object]) -> float:
        found = counted_flops(call) / 1e9
        bench.note(f"counts: {name}", found, "GFLOP")
        return found

    with torch.no_grad():
        note("direction of the derivative (v-head only, r = t)", lambda: model(z, heads="v", **inputs))
        note("forward pass alone", lambda: model(z, **inputs))
    note("forward pass with derivative", lambda: model.forward_with_derivative(z, z, **inputs))
    forward = note("loss", lambda: objective.loss(model, **batch))
    total = note("loss and backward pass", lambda: objective.loss(model, **batch)["loss"].backward())
    bench.note("counts: backward pass", total - forward, "GFLOP")


def large(bench: Bench) -> None:
    """The same for the larger sizes, eager, in the micro-batches of their presets."""
    for name, images in (("TF-L", 32), ("TF-H", 16)):
        model = network(bench, name)
        timed_step(bench, f"large: {name}", model, STEP_GFLOP[name], "bfloat16", False, images)


def timed_step(
    bench: Bench, name: str, model: Any, gflop: float, kind: str, is_compiled: bool, images: int
) -> None:
    how = f"{name} {kind} {'compiled' if is_compiled else 'eager'}"
    with bench.attempt(f"{how}, {images} images"):
        loss = compiled(objective.loss) if is_compiled else objective.loss
        batch = canvases(model, bench.size(images, 2), bench.device)

        def call() -> None:
            with arithmetic(bench.device, kind):
                terms = loss(model, **batch)
            terms["loss"].backward()

        if bench.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        call()
        bench.wait()
        first = time.perf_counter() - start
        rate = len(batch["x"]) / bench.seconds(call, repeats=5)
        share = {"mfu": gflop * rate / 989e3} if bench.is_cuda else {}
        bench.note(f"{how}, {images} images", rate, "images/s", first_call_s=first, **share)
        if bench.is_cuda:
            peak = torch.cuda.max_memory_allocated() / 2**30
            bench.note(f"{how}, peak memory of {images} images", peak, "GiB")
        if images == 64 and not bench.tiny:
            bench.profile(f"step-{'compiled' if is_compiled else 'eager'}", call)
    model.zero_grad(set_to_none=True)


def update(bench: Bench) -> None:
    """What a step does once for all its images: Muon, Adam, weight averages; and the cost of the derivative."""
    model = network(bench, "TF-B")
    shapes: dict[tuple[int, int], int] = {}
    for p in model.parameters():
        if p.ndim == 2:
            shape = (min(p.shape), max(p.shape))
            shapes[shape] = shapes.get(shape, 0) + 1
    for kind in KINDS:
        torch.set_float32_matmul_precision("highest" if kind == "float32" else "high")
        total = 0.0
        for shape, count in shapes.items():
            dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
            stack = torch.randn(min(count, 32), *shape, device=bench.device, dtype=dtype)
            total += bench.seconds(lambda stack=stack: orthogonalise(stack), repeats=3) * count / len(stack)
        bench.note(f"update: TF-B Newton–Schulz {kind}", total * 1e3, "ms")
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer = MuonAdam(model.named_parameters(), OptimConfig())
    averages = WeightAverages(model, OptimConfig().ema_halflives_kimg)
    bench.note("update: TF-B whole optimiser step", bench.seconds(optimizer.step, repeats=3) * 1e3, "ms")
    seconds = bench.seconds(lambda: averages.update(model, 1024, 1024))
    bench.note("update: TF-B three weight averages", seconds * 1e3, "ms")
    batch = canvases(model, bench.size(32, 1), bench.device)
    x, inputs = batch["x"], {name: batch[name] for name in ("t", "r", "label", "level", "prev")}
    with torch.no_grad(), arithmetic(bench.device, "bfloat16"):
        plain = bench.seconds(lambda: model(x, **inputs))
        derived = bench.seconds(lambda: model.forward_with_derivative(x, x, **inputs))
    bench.note("update: forward with derivative, over forward", derived / plain, "times")


def fit(bench: Bench) -> None:
    """`trainer train` itself, on the shards of section `build`, and `post-train`; images/s of their logs."""
    shards = finished_shards(bench)
    common = ["--quiet", "--set", "sample_images=null", "--set", "tensorboard=false"]
    words = ["--preset", "TF-B", "--total-images", "12288", "--set", "log_images=2048"]
    words += ["--set", "loader_workers=8", "--set", "precision=bfloat16", "--set", "micro_batch_size=128"]
    post = ["--total-images", "2048", "--set", "batch_size=512", "--set", "log_images=512"]
    if bench.tiny:
        small = ["--total-images", "6", "--set", "batch_size=2", "--set", "log_images=2"]
        words, post = ["--preset", "tiny-cpu", *small], [*small]
        post += ["--set", "classes=[all]"]  # no class has two images
    post += ["--set", "spaces=[tokens]", "--set", "micro_batch_size=null"]
    runs = {how: bench.out / f"run-compile-{how}" for how in ("false", "true")}
    train = {
        how: ["train", str(shards), "--out", str(run), *words, *common, "--set", f"compile={how}"]
        for how, run in runs.items()
    }
    note_rate(bench, "fit: trainer train, compile=false", train["false"], runs["false"])
    out = bench.out / "run-post-trained"
    command = ["post-train", str(runs["false"]), "--shards", str(shards), "--out", str(out), *post, *common]
    note_rate(bench, "fit: trainer post-train, 512 images a step", command, out)
    if not bench.tiny:  # it compiles for minutes
        note_rate(bench, "fit: trainer train, compile=true", train["true"], runs["true"])


def note_rate(bench: Bench, name: str, command: list[str], run: Path) -> None:
    """Run a command of the trainer, and note what its log says after the first line."""
    words = [sys.executable, "-m", "trainer.cli", *command]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    log = run / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    rows = [row for row in rows if "images_per_second" in row][1:]
    if not rows:
        bench.note(name, f"failed: {done.stderr.strip()[-300:]}")
        return
    share = {"mfu": rows[-1]["mfu"]} if "mfu" in rows[-1] else {}
    bench.note(name, statistics.median(row["images_per_second"] for row in rows), "images/s", **share)


def loader(bench: Bench) -> None:
    """Batches of 1,024 from shards into page-locked memory and onto the device."""
    index = open_index(finished_shards(bench))
    sizes, rounds = tuple(shard.num_samples for shard in index.shards), bench.size(24, 3)
    plan = StreamPlan(shard_sizes=sizes, num_levels=index.num_levels, batch_size=bench.size(1024, 2))
    for threads in (1, 2, 4, 8):
        dataset = BatchDataset(index, plan, verify=False)
        began, seen = 0.0, 0
        for number, batch in enumerate(
            batch_loader(dataset, range(rounds), threads, pin_memory=bench.is_cuda)
        ):
            batch.to(bench.device)
            bench.wait()
            seen += len(batch)
            if number == rounds // 3:  # the page-locked memory has been taken by now
                began, seen = time.perf_counter(), 0
        bench.note(
            f"loader: {threads} threads to the device", seen / (time.perf_counter() - began), "samples/s"
        )


# ---------------------------------------------------------------- images → shards


def encoder(bench: Bench) -> None:
    """DINOv2 with random weights: the network alone, and `encode` with its copies."""
    for size, gflop in (("B", 47.1), ("L", 162.0)):
        timm_name = "dinov2-reg-base" if size == "B" else "dinov2-reg-large"
        name = "timm:vit_tiny_patch16_224" if bench.tiny else timm_name
        found = load_encoder(name, weights="random:0", precision="bfloat16", device=bench.device)
        for images in (1,) if bench.tiny else (128, 32, 256, 512):
            pixels = torch.rand(images, 3, 224, 224, device=bench.device)
            for how in ("eager", "compiled") if images == 128 else ("eager",):
                label = f"encoder: DINOv2-{size} bfloat16 {how}, {images} images"
                with bench.attempt(label), torch.inference_mode():
                    call = torch.compile(found.tokens) if how == "compiled" else found.tokens
                    rate = images / bench.seconds(lambda call=call, pixels=pixels: call(pixels))
                    bench.note(label, rate, "images/s", tflops=gflop * rate / 1e3)
            crops = np.random.default_rng(0).integers(0, 255, (images, 224, 224, 3), np.uint8)
            label = f"encoder: DINOv2-{size} encode() to float16 in memory, {images} images"
            with bench.attempt(label):
                seconds = bench.seconds(partial(encoded, found, crops))
                bench.note(label, images / seconds, "images/s")
        if bench.tiny:
            break
        bench.profile(f"encoder-{size}", partial(encoded, found, crops))


def encoded(found: Encoder, crops: np.ndarray) -> np.ndarray:
    """What a build keeps of a batch: features float16 in ordinary memory."""
    return encode(found, crops, half=True).astype(np.float16)


def build(bench: Bench) -> None:
    """`hierarchy-builder build` itself, on drawn photographs of the size of ImageNet's."""
    photos = bench.out / "photos"
    draw_photos(photos, bench.size(6_000, 4))
    for workers in (0,) if bench.tiny else (4, 2, 1, 6):
        for how in ("--fused",) if bench.tiny or workers != 4 else ("--fused", "--no-fused"):
            out = bench.out / f"build-{workers}{how}"
            words = [
                "--encoder",
                "dct" if bench.tiny else "dinov2-reg-base",
                "--quiet",
                "--json",
                "--out",
                str(out),
            ]
            if not bench.tiny:
                words += [
                    "--weights",
                    "random:0",
                    "--precision",
                    "bfloat16",
                    "--gpus-per-worker",
                    f"{1 / workers:.3f}",
                ]
            command = [sys.executable, "-m", "hierarchy_builder.cli", "build", str(photos), *words]
            command += ["--workers", str(workers), *([how] if how == "--fused" else [])]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            name = f"build: images → shards, {workers} workers" + ("" if how == "--fused" else ", in stages")
            try:
                rows = json.loads(done.stdout)
                stages = rows if isinstance(rows, list) else rows.get("stages", [rows])
                seconds = {row["stage"]: row["seconds"] for row in stages}
                images = stages[0]["images"]
            except (ValueError, KeyError, IndexError, TypeError, AttributeError):
                bench.note(name, f"failed: {done.stderr.strip()[-300:]}")
                continue
            bench.note(name, images / max(sum(seconds.values()), 1e-9), "images/s", seconds=seconds)


def draw_photos(folder: Path, count: int) -> None:
    """JPEGs of 500×375 pixels and about 110 kB, out of noise on many scales; 64 pictures, each under many names."""
    random, bank = np.random.default_rng(0), []
    for _ in range(min(count, 64)):
        picture = np.zeros((375, 500, 3), np.float32)
        for scale in (4, 16, 64, 128, 500):
            noise = random.integers(0, 255, (scale * 3 // 4, scale, 3), np.uint8)
            picture += np.asarray(Image.fromarray(noise).resize((500, 375)), np.float32) / scale**0.5
        file = io.BytesIO()
        Image.fromarray((255 * picture / picture.max()).astype(np.uint8)).save(file, "JPEG", quality=90)
        bank.append(file.getvalue())
    for number in range(count):
        place = folder / f"class{number % 8}" / f"{number:06d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(bank[number % len(bank)])


def hierarchy(bench: Bench) -> None:
    """The recipe `paper` on the cores, and its Gram matrices on the device."""
    features = torch.randn(bench.size(512, 4), 16, 16, 768 if not bench.tiny else 32).half()
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        seconds = bench.seconds(lambda threads=threads: build_hierarchy(features, threads=threads), repeats=3)
        bench.note(f"hierarchy: {threads} cores", len(features) / seconds, "images/s")
    tokens = features.to(bench.device).flatten(1, 2)
    for dtype in (torch.float32, torch.float64):
        seconds = bench.seconds(lambda dtype=dtype: torch.bmm(tokens.to(dtype), tokens.to(dtype).mT))
        bench.note(
            f"hierarchy: Gram matrices on the device, {dtype}", 1e6 * seconds / len(features), "µs each"
        )


def jpeg(bench: Bench) -> None:
    """nvImageCodec, where it is installed, on drawn photographs: its speed, and its difference from Pillow."""
    draw_photos(bench.out / "photos", count := bench.size(128, 4))
    data = [path.read_bytes() for path in sorted((bench.out / "photos").glob("*/*.jpg"))[:count]]
    name = "jpeg: nvImageCodec, 128 at once"
    with bench.attempt(name):
        from nvidia import nvimgcodec as codec

        place = {"device_id": 0}
        if not bench.is_cuda:
            ends = [codec.Backend(codec.CPU_ONLY)]
            place = {"device_id": codec.NVIMGCODEC_DEVICE_CPU_ONLY, "backends": ends}
        decoder, wanted = codec.Decoder(**place), codec.DecodeParams(color_spec=codec.ColorSpec.SRGB)
        streams = [codec.CodeStream(each) for each in data]
        found = decoder.decode(streams, params=wanted)
        expected = [np.asarray(Image.open(io.BytesIO(each)).convert("RGB"), np.int16) for each in data]
        apart = [abs(np.asarray(a.cpu()) - b).mean() for a, b in zip(found, expected, strict=True)]
        bench.note("jpeg: nvImageCodec, mean difference of a value", float(np.mean(apart)))
        seconds = bench.seconds(lambda: decoder.decode(streams, params=wanted))
        bench.note(name, len(data) / seconds, "images/s")


# ---------------------------------------------------------------- sampling, vocabulary, post-training


def sample(bench: Bench) -> None:
    """A trajectory of TF-B and a picture of RAE's largest decoder, alone and many at once."""
    model = network(bench, "TF-B").eval()
    C = model.config.in_channels
    decoder = (
        RaeDecoder(RaeDecoderConfig.of_size("tiny" if bench.tiny else "XL", C, 16, 16))
        .to(bench.device)
        .eval()
    )
    for kind in ("bfloat16",) if bench.tiny else KINDS:
        for images in (1,) if bench.tiny else (1, 32, 256):
            noise = torch.randn(4, images, 16, 16, C, device=bench.device)
            label = torch.zeros(images, dtype=torch.long, device=bench.device)
            with bench.attempt(f"sample: {kind}, {images}"), torch.no_grad(), arithmetic(bench.device, kind):
                seconds = bench.seconds(
                    lambda noise=noise, label=label: sample_levels(model, label, noise), repeats=5
                )
                bench.note(f"sample: 4 levels, {kind}, {images} at once", 1e3 * seconds / images, "ms each")
                seconds = bench.seconds(lambda noise=noise: decoder(noise[0]), repeats=5)
                bench.note(f"sample: RAE ViT-XL, {kind}, {images} at once", 1e3 * seconds / images, "ms each")
                if images == 32 and kind == "bfloat16":
                    bench.profile(
                        "sample", lambda noise=noise, label=label: sample_levels(model, label, noise)
                    )


def vocabulary(bench: Bench) -> None:
    """k-means at D = 768 by torch and by the libraries that are installed."""
    tokens = np.random.default_rng(0).standard_normal((bench.size(262_144, 512), 768), np.float32)
    centroids = tokens[: bench.size(4096, 8)].copy()
    seconds = bench.seconds(lambda: kmeans.sum_clusters(tokens.astype(np.float16), centroids), repeats=2)
    bench.note("kmeans: torch, one iteration of 262,144 × 768, 4,096 centroids", seconds, "s")
    if not bench.tiny:
        half = tokens.astype(np.float16)
        bench.profile("kmeans", lambda: kmeans.sum_clusters(half, centroids))
    for engine, package in (("faiss", "faiss"), ("cuml", "cuml"), ("flash", "flash_kmeans")):
        name = f"kmeans: {package}, ten iterations of the same"
        with bench.attempt(name):
            importlib.import_module(package)
            if engine == "flash":
                from flash_kmeans import batch_kmeans_Euclid

                rows = torch.from_numpy(tokens)[None].to(bench.device)
                call = partial(batch_kmeans_Euclid, rows, len(centroids), max_iters=10)
            else:
                config = kmeans.VocabularyConfig(sizes=(len(centroids),), backend=engine, iterations=10)
                call = partial(kmeans.fit_prototypes, tokens, config)
            bench.note(name, bench.seconds(call, repeats=1), "s")


def post_training(bench: Bench) -> None:
    """A Fréchet distance with its gradient, at the width of pooled tokens and of 16 pooled squares."""
    for width in (8,) if bench.tiny else (768, 2048):
        rows = torch.randn(4 * width, width, device=bench.device, dtype=torch.float64)
        with bench.attempt(f"post_training: distance at width {width}"):
            target = Target.of(rows.mean(0), rows.T.cov(), "bench")
            mean, covariance = rows.mean(0) + 0.1, (1.1 * rows).T.cov()
            seconds = bench.seconds(lambda t=target, m=mean, c=covariance: t.distance(m, c), repeats=3)
            bench.note(f"post_training: distance at width {width}", seconds * 1e3, "ms")
            if not bench.tiny:
                bench.profile(f"distance-{width}", lambda t=target, m=mean, c=covariance: t.distance(m, c))


def tests(bench: Bench) -> None:
    """The tests that need a CUDA device."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider"]
    command += ["--collect-only"] if bench.tiny else []
    asked = {**os.environ, "CUDA_TESTS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=asked)
    lines = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()
    bench.note("tests: pytest -m cuda", lines[-1][:300])


# ---------------------------------------------------------------- what sections share


def small_network(device: torch.device | str) -> TrajectoryTransformer:
    """Two blocks and two heads of width 64 on 32 channels, with gates that are open."""
    config = dataclasses.replace(
        PRESETS["TF-B"]().model, width=64, depth=2, head_depth=1, num_heads=2, in_channels=32, num_classes=10
    )
    torch.manual_seed(0)
    model = TrajectoryTransformer(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape))
    return model.to(device)


def network(bench: Bench, name: str) -> TrajectoryTransformer:
    """The network of a preset; a small one in a rehearsal."""
    if bench.tiny:
        return small_network(bench.device)
    torch.manual_seed(0)
    with torch.device(bench.device):
        return TrajectoryTransformer(PRESETS[name]().model)


def canvases(model: TrajectoryTransformer, images: int, device: torch.device | str) -> dict[str, Tensor]:
    """Arguments of the loss for random canvases, equal on every device."""
    c, generator = model.config, torch.Generator().manual_seed(0)
    draws = objective.draw_batch(StepRows(batch_size=images, seed=0, step=0), (1, 1, 1), MethodConfig())
    found = {
        "x": torch.randn(images, *c.grid, c.in_channels, generator=generator),
        "prev": torch.randn(images, *c.grid, c.in_channels, generator=generator),
        "noise": torch.randn(images, *c.grid, c.in_channels, generator=generator),
        "regions": torch.randint(0, 9, (images, *c.grid), generator=generator, dtype=torch.uint8),
        "level": torch.arange(images) % c.num_levels,
        "label": torch.arange(images) % c.num_classes,
        "t": draws.t,
        "r": draws.r,
    }
    return {name: value.to(device) for name, value in found.items()}


def finished_shards(bench: Bench) -> str:
    """The shards that section `build` has written."""
    for marker in sorted(bench.out.glob("build-*/shards/_SUCCESS")):
        return str(marker.parent)
    raise FileNotFoundError(f"{bench.out} holds no shards: run section build first")


# ---------------------------------------------------------------- sections, each in a process of its own

SECTIONS = {
    parity: 90,
    roof: 45,
    counts: 60,
    step: 120,
    compile_step: 540,
    encoder: 240,
    build: 300,
    update: 60,
    fit: 360,
    hierarchy: 45,
    jpeg: 45,
    loader: 60,
    sample: 90,
    large: 120,
    vocabulary: 60,
    post_training: 45,
    tests: 120,
}
"""Seconds that a section may take; those of most worth come first."""


def main() -> None:
    options = make_parser().parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.record:
        write_record(options.record, options.out)
        return
    check_machine(options)
    ends, failed = time.monotonic() + 60 * options.minutes, False
    for section, limit in SECTIONS.items():
        name, left = section.__name__, ends - time.monotonic()
        marker = options.out / f"{name}.done"
        if (options.sections and name not in options.sections.split(",")) or marker.exists():
            continue
        if left < 15:
            print(f"-- {name}: left out, {left:.0f} s are left; the same command goes on here", flush=True)
            continue
        start = time.monotonic()
        ended = run_section(section, options, min(limit, left))
        print(f"-- {name}: {ended} after {time.monotonic() - start:.0f} s", flush=True)
        if ended == "done":
            marker.touch()
        failed = failed or ended != "done"
    sys.exit(1 if failed else 0)


def run_section(section: Callable[[Bench], None], options: argparse.Namespace, limit: float) -> str:
    """Run a section in a forked process, which shares the imports, and end it with its children at the limit."""

    def work() -> None:
        os.setpgrp()
        try:
            section(Bench(options.out, options.device, options.tiny))
        except Exception:
            traceback.print_exc()
            os._exit(1)  # not the exit of the parent, whose open files are shared
        sys.stdout.flush()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(limit)
    if process.exitcode == 0:
        return "done"
    ended = "stopped at its limit" if process.exitcode is None else f"failed with code {process.exitcode}"
    with suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()
    return ended


def check_machine(options: argparse.Namespace) -> None:
    """Say what the machine has; the parent itself never opens the device, since forked processes could not then."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
    }
    versions |= {"cores": str(len(os.sched_getaffinity(0))), "device": options.device}
    print(", ".join(f"{name} {value}" for name, value in versions.items()), flush=True)
    if options.device == "cuda" and torch.version.cuda is None:
        sys.exit(
            f"torch {torch.__version__} is built without CUDA: install a CUDA build, or give --device cpu --tiny"
        )
    (options.out / "machine.json").write_text(json.dumps(versions) + "\n")
    words = ["gpu-figures" if word == str(options.out) else word for word in sys.argv[1:]]
    with open(options.out / "commands.txt", "a") as file:
        file.write(shlex.join(["python", "-m", "benchmarks.gpu", *words]) + "\n")


def write_record(name: str, out: Path) -> None:
    """Write predictions and, where `out` holds them, measurements as a record."""
    path = out / "figures.jsonl"
    figures = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )
    measured = {row["name"]: row for row in figures}
    names = [*PREDICTED, *(key for key in measured if key not in PREDICTED)]
    rows = []
    for key in names:
        found, guess = measured.get(key), PREDICTED.get(key)
        unit = guess.unit if guess else found["unit"] if found else ""
        predicted = f"{_shown(guess.value)} {unit}".strip() if guess else ""
        value = f"{_shown(found['value'])} {found['unit']}".strip() if found else "unmeasured"
        rows.append([key, predicted, guess.formula if guess else "", value])
    columns = ["figure", "predicted", "from", "measured"]
    calls = out / "commands.txt"
    before = calls.read_text().splitlines() if calls.exists() else []
    commands = [*dict.fromkeys(before), "python -m benchmarks.gpu --out gpu-figures --record"]
    records.write(
        name, columns=columns, rows=rows, seeds=[0], figures={"measured": figures}, commands=commands
    )


def _shown(value: float | str | bool) -> str:
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="Folder of figures, traces and scratch files."
    )
    parser.add_argument(
        "--minutes", type=float, default=25, help="When to stop; sections not done are left out."
    )
    names = ", ".join(section.__name__ for section in SECTIONS)
    parser.add_argument("--sections", help=f"Only these, by commas: {names}.")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="Sizes that a CPU rehearses in seconds.")
    records.add_option(parser)
    return parser


if __name__ == "__main__":
    main()
