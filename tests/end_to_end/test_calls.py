"""From photographs to a sample in two calls of Python."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import hierarchy_builder
import trainer
from hierarchy_builder.errors import UsageError

TINY = {"model.width": 16, "model.num_heads": 2, "model.depth": 2, "total_images": 32, "sample_images": None}


def test_two_calls_from_photographs_to_a_sample(
    tiny_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the README has them, on a smaller network and a class of these photographs."""
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```python\n(import hierarchy_builder\n.*?)```", readme, re.S)
    for written, here in (('"PHOTOS"', repr(str(tiny_photos))), ('"cat"', "0")):
        assert written in text
        text = text.replace(written, here)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "train", partial(trainer.train, settings=TINY))
    found: dict[str, Any] = {}
    exec(text, found)
    assert list(found["shards"].glob("*.tar"))
    assert hierarchy_builder.build_shards(tiny_photos, "DIR", encoder="dct") == found["shards"]
    assert found["pipe"](0, seed=0).decode().ndim == 4
    assert Path("cat.html").is_file()


def test_mistakes_name_the_nearest_field(tiny_photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown field 'imagez', did you mean 'images'"):
        hierarchy_builder.build_shards(tiny_photos, tmp_path / "build", encoder="dct", imagez=True)
    assert not (tmp_path / "build").exists()
