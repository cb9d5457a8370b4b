"""From photographs to a sample in two calls of Python."""

from pathlib import Path

import pytest

import hierarchy_builder
import trainer
from hierarchy_builder.errors import UsageError

TINY = {"model.width": 16, "model.num_heads": 2, "model.depth": 2, "total_images": 32, "sample_images": None}


def test_two_calls_from_photographs_to_a_sample(tiny_photos: Path, tmp_path: Path) -> None:
    shards = hierarchy_builder.build(tiny_photos, tmp_path / "build", encoder="dct", images=True, workers=0)
    assert list(shards.glob("*.tar"))
    assert (
        hierarchy_builder.build_shards(tiny_photos, tmp_path / "build", encoder="dct", images=True) == shards
    )
    pipe = trainer.train(shards, tmp_path / "run", preset="tiny-cpu", settings=TINY)
    assert pipe(0, seed=0).decode().ndim == 4


def test_mistakes_name_the_nearest_field(tiny_photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown field 'imagez', did you mean 'images'"):
        hierarchy_builder.build_shards(tiny_photos, tmp_path / "build", encoder="dct", imagez=True)
    assert not (tmp_path / "build").exists()
