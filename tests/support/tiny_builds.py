"""A build that takes seconds: 18 drawn photographs, every stage; its configuration and what it left on disk."""

import hashlib
from pathlib import Path

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build.workers import Workers
from hierarchy_builder.config import ExtractConfig, HierarchyRecipe, ShardConfig, VocabularyConfig
from hierarchy_builder.progress import Reporter
from hierarchy_builder.store.folder import BuildFolder

PLAN = steps.BuildPlan(
    extract=ExtractConfig(encoder="dct", block_rows=8, batch_size=4),
    hierarchy=HierarchyRecipe.paper(),
    vocabulary=VocabularyConfig(sizes=(2, 5), sampled_tokens=2000, iterations=4),
    shard=ShardConfig(samples_per_shard=5, images=True, covariance=True),
)


def session(workers: int = 0, fresh: bool = False) -> steps.Session:
    return steps.Session(workers=Workers(count=workers), reporter=Reporter(quiet=True), fresh=fresh)


def digests(folder: Path, pattern: str = "*") -> dict[str, str]:
    files = sorted(path for path in folder.rglob(pattern) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def make(root: Path, photos: Path) -> BuildFolder:
    """Every stage, in this process."""
    folder = BuildFolder(root)
    steps.build(folder, str(photos), PLAN, session())
    return folder
