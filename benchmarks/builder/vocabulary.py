"""k-means of one data set by engine torch and by faiss.Kmeans, on equal tokens, in one run.

    python -m benchmarks.builder.vocabulary DIR --prototypes 256 --tokens 262144 --threads 2 --seeds 3

DIR is a build; without it tokens are drawn from a mixture of Gaussians. Both engines get the same tokens, number of
prototypes and iterations, and each its own start: k-means++ here, random tokens in faiss. faiss runs once with one
thread and once with all, and its faster time counts. Inertia of both is measured by the same function. Seconds hold
start and iterations; rows are followed by one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from benchmarks import records
from hierarchy_builder.build.vocabulary import TokenSource
from hierarchy_builder.config import VocabularyConfig
from hierarchy_builder.store import arrays as stores
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.vocabulary.kmeans import fit_prototypes, sum_clusters
from hierarchy_builder.vocabulary.prototypes import draw_tokens


def main() -> None:
    arguments = make_parser().parse_args()
    torch.set_num_threads(1)
    tokens = tokens_of(arguments.build, arguments.tokens) if arguments.build else drawn(arguments)
    rows = [compare(tokens, arguments, seed) for seed in range(arguments.seeds)]
    report(rows, tokens, arguments)


def tokens_of(build: Path, num_tokens: int) -> np.ndarray:
    """Tokens of a build as a fit would draw them, float16 [M, C]."""
    source = TokenSource.load(BuildFolder(build), VocabularyConfig(sampled_tokens=num_tokens))
    return np.concatenate(
        [
            draw_tokens(
                stores.read_block(source.folder.features, "features", block),
                range(block.start, block.stop),
                source.given[block.start : block.stop],
                seed=0,
            )
            for block in source.blocks
        ]
    )


def drawn(arguments: argparse.Namespace) -> np.ndarray:
    """Tokens about 2,000 centres as far apart as the tokens of each are, float16 [M, C]."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((2000, arguments.channels), dtype=np.float32)
    member = random.integers(len(centres), size=arguments.tokens)
    noise = random.standard_normal((arguments.tokens, arguments.channels), dtype=np.float32)
    return (centres[member] + noise).astype(np.float16)


def compare(tokens: np.ndarray, arguments: argparse.Namespace, seed: int) -> dict[str, float]:
    """Inertia and seconds of both engines from one seed."""
    config = VocabularyConfig(sizes=(arguments.prototypes,), iterations=arguments.iterations, seed=seed)
    ours, ours_s = timed(lambda: fit_prototypes(tokens, config, threads=arguments.threads))
    faiss_s = {}
    single = tokens.astype(np.float32)
    for threads in (1, arguments.threads):
        faiss.omp_set_num_threads(threads)
        theirs = faiss.Kmeans(
            tokens.shape[1],
            arguments.prototypes,
            niter=arguments.iterations,
            seed=seed,
            max_points_per_centroid=len(tokens),
            min_points_per_centroid=1,
        )
        _, faiss_s[threads] = timed(lambda: theirs.train(single))  # noqa: B023 (called at once)
    inertia = sum_clusters(tokens, theirs.centroids, threads=arguments.threads).inertia
    return {
        "seed": seed,
        "torch": ours.inertia[-1] / len(tokens),
        "faiss": inertia / len(tokens),
        "torch_s": ours_s,
        "faiss_1_thread_s": faiss_s[1],
        "faiss_all_threads_s": faiss_s[arguments.threads],
    }


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return call(), time.perf_counter() - started


def report(rows: list[dict[str, float]], tokens: np.ndarray, arguments: argparse.Namespace) -> None:
    print(
        f"{len(tokens):,} tokens of {tokens.shape[1]} channels, {arguments.prototypes:,} prototypes,"
        f" {arguments.iterations} iterations, {arguments.threads} threads"
    )
    print("seed   inertia per token: torch      faiss   ratio   seconds: torch   faiss (1 thread, all)")
    for row in rows:
        print(
            f"{row['seed']:4.0f} {row['torch']:26.6g} {row['faiss']:10.6g} {row['torch'] / row['faiss']:7.4f}"
            f" {row['torch_s']:16.1f} {row['faiss_1_thread_s']:9.1f} {row['faiss_all_threads_s']:11.1f}"
        )
    ratios = [row["torch"] / row["faiss"] for row in rows]
    times = [min(row["faiss_1_thread_s"], row["faiss_all_threads_s"]) / row["torch_s"] for row in rows]
    figures = {
        "inertia_ratio_median": statistics.median(ratios),
        "inertia_ratio_worst": max(ratios),
        "times_as_fast_as_faiss": statistics.median(times),
    }
    print(json.dumps(figures))
    fastest = [min(row["faiss_1_thread_s"], row["faiss_all_threads_s"]) for row in rows]
    records.write(
        arguments.record,
        columns=[
            "tokens",
            "inertia, this project over faiss.Kmeans",
            "seconds, this project",
            "seconds, faiss",
        ],
        rows=[
            [
                f"{len(tokens):,} × {tokens.shape[1]}",
                ", ".join(f"{ratio:.3f}" for ratio in ratios),
                ", ".join(f"{row['torch_s']:.1f}" for row in rows),
                ", ".join(f"{seconds:.1f}" for seconds in fastest),
            ]
        ],
        seeds=range(arguments.seeds),
        figures=figures,
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("build", nargs="?", type=Path)
    parser.add_argument("--prototypes", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--channels", type=int, default=768, help="of drawn tokens")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    records.add_option(parser)
    return parser


if __name__ == "__main__":
    main()
