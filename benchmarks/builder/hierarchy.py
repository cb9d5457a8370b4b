"""Time build_hierarchy against the same recipe written with scikit-learn and scipy, in one paired run.

    python -m benchmarks.builder.hierarchy --images 64 --channels 768 --threads 1

Both sides get the same images and the same number of threads: ours uses them within one process, the
reference as that many single-threaded processes, which suits it best. Rounds alternate between the two;
the median and the best round are printed as milliseconds per image and core, one line of JSON at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np

from benchmarks import records

sys.path.insert(0, str(records.ROOT / "tests" / "support"))


def synthetic_features(num_images: int, num_channels: int) -> np.ndarray:
    """Smooth random fields with noise, float16 [N, 16, 16, C]: about half of the tokens are object."""
    random = np.random.default_rng(0)
    coarse = random.normal(size=(num_images, 5, 5, num_channels)).astype(np.float32)
    position = np.linspace(0, 4, 16)
    weight = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(5))).astype(np.float32)
    field = np.einsum("yi,xj,nijc->nyxc", weight, weight, coarse, optimize=True)
    return (field + 0.3 * random.standard_normal(field.shape, dtype=np.float32)).astype(np.float16)


def reference(features: np.ndarray) -> int:
    """Run the reference over one worker's images; returns their number."""
    from reference_hierarchy import reference_regions

    return sum(len(reference_regions(image)) > 0 for image in features)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    arguments = make_parser().parse_args()
    features = synthetic_features(arguments.images, arguments.channels)

    def workers() -> ProcessPoolExecutor:  # each starts with one BLAS and OpenMP thread
        return ProcessPoolExecutor(arguments.threads, mp_context=get_context("spawn"))

    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    with workers() as pool:
        shares = np.array_split(features, arguments.threads)
        list(pool.map(reference, [share[:1] for share in shares]))  # start, import
        ours = _ours(arguments.threads)
        ours(features)  # compile
        rounds = [
            (seconds(lambda: list(pool.map(reference, shares))), seconds(lambda: ours(features)))
            for _ in range(arguments.rounds)
        ]
    _report(np.array(rounds) * 1e3 * arguments.threads / arguments.images, arguments)


def _ours(threads: int) -> Callable[[np.ndarray], object]:
    import torch

    from hierarchy_builder.hierarchy.recipe import build_hierarchy

    torch.set_num_threads(1)
    return partial(build_hierarchy, threads=threads)


def _report(ms_per_image: np.ndarray, arguments: argparse.Namespace) -> None:
    (reference_median, ours_median), (reference_best, ours_best) = (
        np.median(ms_per_image, 0),
        ms_per_image.min(0),
    )
    ratio = statistics.median(ms_per_image[:, 0] / ms_per_image[:, 1])
    print(
        f"{arguments.images} images, 16×16×{arguments.channels}, {arguments.threads} thread(s); ms per image and core"
    )
    print(f"scikit-learn + scipy   median {reference_median:6.2f}   best {reference_best:6.2f}")
    print(f"build_hierarchy        median {ours_median:6.2f}   best {ours_best:6.2f}")
    print(
        f"ratio                  median of pairs {ratio:.1f}   of best rounds {reference_best / ours_best:.1f}"
    )
    figures = {"reference_ms": reference_median, "ours_ms": ours_median, "ratio": ratio}
    print(json.dumps(figures))
    records.write(
        arguments.record,
        columns=["threads", "scikit-learn and scipy, ms per image and core", "this project, ms", "ratio"],
        rows=[[arguments.threads, f"{reference_median:.2f}", f"{ours_median:.2f}", f"{ratio:.1f}"]],
        seeds=[0],
        figures=figures,
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    records.add_option(parser)
    return parser


if __name__ == "__main__":
    main()
