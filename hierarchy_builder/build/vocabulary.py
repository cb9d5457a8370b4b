"""Fit a vocabulary to all features of a build: draw tokens, run k-means, then add the coarser levels.

Tokens are drawn block by block into files below `vocabulary/`. In each iteration, workers sum the tokens of runs (a run
is a group of whole blocks), and the driver adds the sums in the order of the runs and moves the centroids. The
centroids are saved after every move, so an interrupted fit resumes there and ends with the same bytes.

    N images, M tokens of the fit, K prototypes of the finest level, C channels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from hierarchy_builder.build.stages import one_thread
from hierarchy_builder.build.workers import Pool, Workers, open_pool
from hierarchy_builder.config import VocabularyConfig
from hierarchy_builder.errors import VerificationError
from hierarchy_builder.files.untrusted.arrays import npz_of, parse_npz
from hierarchy_builder.files.whole import decoding, write_bytes
from hierarchy_builder.progress import Reporter
from hierarchy_builder.records import Block, Status
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.ledger import stage_entry
from hierarchy_builder.store.stored import Stored
from hierarchy_builder.store.units import stage_units, store_layout, usable_rows
from hierarchy_builder.vocabulary.kmeans import (
    ClusterSums,
    Prototypes,
    check_tokens,
    first_centroids,
    fit_prototypes,
    lloyd,
    num_start_tokens,
    start_rows,
    sum_clusters,
)
from hierarchy_builder.vocabulary.prototypes import Vocabulary, draw_tokens, nest_prototypes, token_shares

RUN_TOKENS = 32_768
"""Smallest number of tokens of a run; summing so many takes a hundred times as long as sending the sums."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenSource:
    """The tokens of a fit, as every worker reads them.

    blocks: those of the store; each has one file of drawn tokens. given, drawn: int64 [N], by row of the index: the
    number of tokens used in the fit, and the number drawn into files. They are equal if a sample of the tokens is
    fitted; if all are, the files hold only the tokens for k-means++.
    """

    folder: BuildFolder
    config: VocabularyConfig
    blocks: Sequence[Block]
    given: np.ndarray
    drawn: np.ndarray

    @classmethod
    def load(cls, folder: BuildFolder, config: VocabularyConfig) -> TokenSource:
        """Choose the number of tokens of each image, evenly over all usable images."""
        num_rows, _, encoder = store_layout(stage_entry(folder, "extract"))
        usable, per_image = usable_rows(folder), encoder["grid"][0] * encoder["grid"][1]
        available = len(usable) * per_image
        wanted = min(config.sampled_tokens or available, available)
        given, drawn = np.zeros((2, num_rows), np.int64)
        given[usable] = token_shares(len(usable), wanted)
        drawn[usable] = (
            given[usable]
            if wanted < available
            else token_shares(len(usable), num_start_tokens(available, config))
        )
        blocks = stage_units(folder, "extract")
        return cls(folder=folder, config=config, blocks=blocks, given=given, drawn=drawn)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the fit, M."""
        return int(self.given.sum())

    def file(self, block: Block) -> Path:
        return self.folder.vocabulary_work / f"tokens-{block.number:06d}.npz"

    def runs(self) -> list[Block]:
        """Group whole blocks into runs of at least RUN_TOKENS tokens, the units of an iteration."""
        runs, start, tokens = list[Block](), 0, 0
        for block in self.blocks:
            tokens += int(self.given[block.start : block.stop].sum())
            if tokens >= RUN_TOKENS or (block.stop == len(self.given) and tokens):
                runs.append(Block(number=len(runs), start=start, stop=block.stop))
                start, tokens = block.stop, 0
        return runs

    def draw(self, block: Block, threads: int) -> int:
        """Draw the tokens of a block into its file, and return the number of images read."""
        shares = self.drawn[block.start : block.stop]
        features = Stored(self.folder).block("features", block)
        tokens = draw_tokens(features, range(block.start, block.stop), shares, self.config.seed)
        write_bytes(self.file(block), npz_of(tokens=tokens))
        return len(block)

    def drawn_tokens(self, block: Block) -> np.ndarray:
        """Read the file that `draw` wrote, float16 [m, C]. Raises BuilderError if it is missing or damaged."""
        path = self.file(block)
        with decoding(path, "remove it and run the same command again"), path.open("rb") as file:
            return parse_npz(file)["tokens"]

    def tokens(self, run: Block) -> np.ndarray:
        """Read all tokens of a run that are used in the fit, float16 [m, C]."""
        blocks = [block for block in self.blocks if run.start <= block.start < run.stop]
        if np.array_equal(self.given, self.drawn):
            return np.concatenate([self.drawn_tokens(block) for block in blocks])
        stored, span = Stored(self.folder), slice(run.start, run.stop)
        features = stored.rows("features", span)
        return features[stored.rows("status", span) == Status.OK].reshape(-1, features.shape[-1])

    def sums(self, run: Block, threads: int, centroids: np.ndarray) -> ClusterSums:
        """Assign the tokens of a run to centroids, and return their sums."""
        return sum_clusters(self.tokens(run), centroids, threads=threads)


def fit_vocabulary(
    folder: BuildFolder, config: VocabularyConfig, workers: Workers, reporter: Reporter
) -> Vocabulary:
    """Fit the vocabulary of all usable features; a repeated call resumes an interrupted fit.

    Backend torch uses all workers. faiss and cuml run in this process on all tokens of the fit at once, in 6·M·C bytes
    of memory, and start over after an interruption.
    Raises UsageError for fewer tokens than prototypes, BuilderError if the library of the backend is missing.
    """
    load = partial(TokenSource.load, folder, config)
    source, is_spread = load(), config.backend == "torch"
    check_tokens(source.num_tokens, config)
    workers = workers.that_see(folder.root)
    with open_pool(load, workers, source.blocks, uses_gpu=is_spread) as pool, one_thread():
        _draw(source, pool, reporter)
        if is_spread:
            return nest_prototypes(_iterate(source, pool, reporter), config)
    with one_thread():
        reporter.say(f"vocabulary: {config.backend} fits {source.num_tokens:,} tokens in this process")
        tokens = np.concatenate([source.tokens(run) for run in source.runs()])
        return nest_prototypes(fit_prototypes(tokens, config), config)


def _draw(source: TokenSource, pool: Pool, reporter: Reporter) -> None:
    waiting = [block for block in source.blocks if not source.file(block).exists()]
    images = sum(map(len, source.blocks))
    if waiting:
        with reporter.stage("tokens", images, images - sum(map(len, waiting))) as meter:
            for num_images in pool.map(TokenSource.draw, waiting):
                meter.advance(num_images)


def _iterate(source: TokenSource, pool: Pool, reporter: Reporter) -> Prototypes:
    config, runs = source.config, source.runs()
    state = source.folder.vocabulary_work / "state.npz"
    centroids, inertia = _read_state(state, reporter) or (_first_centroids(source), [])

    def after_move(centroids: np.ndarray, inertia: list[float]) -> None:
        write_bytes(state, npz_of(centroids=centroids, inertia=np.asarray(inertia)))
        reporter.say(
            f"vocabulary: iteration {len(inertia)} of at most {config.iterations}, inertia"
            f" {inertia[-1] / source.num_tokens:.6g} per token before it"
        )

    return lloyd(
        lambda centroids: pool.map(TokenSource.sums, runs, centroids),
        centroids,
        config.iterations,
        inertia=inertia,
        after_move=after_move,
    )


def _first_centroids(source: TokenSource) -> np.ndarray:
    """Choose the first centroids by k-means++ on some of the drawn tokens."""
    rows = start_rows(int(source.drawn.sum()), source.config)
    chosen, passed = [], 0
    for block in source.blocks:
        tokens = source.drawn_tokens(block)
        inside = rows[np.searchsorted(rows, passed) : np.searchsorted(rows, passed + len(tokens))]
        chosen.append(tokens[inside - passed])
        passed += len(tokens)
    return first_centroids(np.concatenate(chosen), source.config)


def _read_state(path: Path, reporter: Reporter) -> tuple[np.ndarray, list[float]] | None:
    if not path.exists():
        return None
    try:
        with decoding(path, "it is not used"), path.open("rb") as file:
            content = parse_npz(file)
            return content["centroids"], content["inertia"].tolist()
    except VerificationError as error:
        reporter.say(f"warning: {error}; the fit starts over, with the same result")
        return None
