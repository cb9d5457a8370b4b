"""A path that does not exist ends every verb with exit code 2 and a message that names it, before any work."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from fixture_shards import write_shards
from pictures import write_tree
from tiny_pipeline import tiny_pipeline, tiny_run

from hierarchy_builder.build.workers import shutdown
from hierarchy_builder.cli import app as builder
from trainer.cli import app as trainer

TRAINER = (
    "train NO --out OUT --preset tiny-cpu",
    "train SHARDS --out OUT --preset tiny-cpu --config NO",
    "train SHARDS --out OUT --preset tiny-cpu --resume NO",
    "train-decoder NO --out OUT --size tiny",
    "train-decoder SHARDS --out OUT --size tiny --config NO",
    "train-decoder SHARDS --out OUT --size tiny --lpips NO",
    "train-decoder SHARDS --out OUT --size tiny --gan NO",
    "sample NO --labels 0 --out OUT",
    "sample RUN --labels 0 --out OUT --weak NO",
    "sample RUN --labels 0 --out OUT --decoder NO",
    "sample RUN --labels 0 --out OUT --pixel-stage NO",
    "encode NO --shards SHARDS --out OUT",
    "encode RUN --shards NO --out OUT",
    "encode RUN --photo NO --label 0 --out OUT",
    "edit NO --list",
    "edit DRAWN --level 0 --region 1 --from NO",
    "edit DRAWN --level 0 --mask NO --to-region 0",
    "edit DRAWN --level 0 --region 1 --vocabulary NO --prototype 1",
    "edit DRAWN --level 0 --seed 3 --run NO --out OUT",
    "edit DRAWN --level 0 --seed 3 --run RUN --weak NO --out OUT",
    "compare NO DRAWN",
    "compare DRAWN NO",
    "compare DRAWN DRAWN --decoder NO",
    "compare DRAWN DRAWN --level 0 --mask NO",
    "sweep NO",
    "sweep RUN --decoder NO",
    "sweep RUN --mask NO",
    "evaluate NO --shards SHARDS",
    "evaluate RUN --shards NO",
    "evaluate RUN --shards SHARDS --weak NO",
    "evaluate RUN --shards SHARDS --reference NO",
    "evaluate RUN --shards SHARDS --inception NO",
    "report NO",
    "report RUN --shards NO",
    "report RUN --stages NO",
    "report RUN --edit NO",
    "report RUN --sweep NO",
    "studio NO",
    "studio RUN --vocabulary NO",
    "import-official NO --out OUT",
    "import-official DRAWN --out OUT --config NO",
    "export-official NO --out OUT",
)
BUILDER = (
    "plan NO --out OUT",
    "plan PHOTOS --out OUT --config NO",
    "plan PHOTOS --out OUT --encoder dct --class-map NO",
    "plan PHOTOS --out OUT --encoder dinov2-reg-base --weights NO",
    "build NO --out OUT --encoder dct",
    "build PHOTOS --out OUT --config NO",
    "build PHOTOS --out OUT --encoder dct --class-map NO",
    "build PHOTOS --out OUT --encoder dct --masks NO",
    "build PHOTOS --out OUT --encoder dinov2-reg-base --weights NO",
    "build PHOTOS --out OUT --encoder onnx:NO",
    "extract NO --out OUT --encoder dct",
    "extract NO",
    "cluster NO",
    "shard NO",
    "publish NO memory://set",
    "repair NO",
    "status NO",
    "verify NO",
    "report NO",
    "compare NO NO",
    "encoders --probe onnx:NO",
    "encoders --probe dinov2-reg-base --weights NO",
)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("places")
    drawn = folder / "drawn.safetensors"
    tiny_pipeline()("ant", 3).save(drawn)
    return {
        "NO": folder / "no" / "such",
        "RUN": tiny_run(folder / "run"),
        "SHARDS": write_shards(folder / "shards"),
        "PHOTOS": write_tree(folder / "photos", per_class=1),
        "DRAWN": drawn,
    }


@pytest.mark.parametrize(
    ("main", "words"),
    [*((trainer.main, words) for words in TRAINER), *((builder.main, words) for words in BUILDER)],
    ids=lambda value: value if isinstance(value, str) else value.__module__.partition(".")[0],
)
def test_a_path_that_does_not_exist(
    main: Callable[[], None],
    words: str,
    places: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    named = {**places, "OUT": tmp_path / "out"}
    arguments = ["command"]
    for word in words.split():
        for name, place in named.items():
            word = word.replace(name, str(place))
        arguments.append(word)
    monkeypatch.setattr("sys.argv", arguments)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGTERM, handler)
        shutdown()
    error = capsys.readouterr().err
    assert ended.value.code == 2, error
    assert str(places["NO"]) in error.replace("\n", "")
    assert "rror: " in error  # ours, or typer's
    assert not named["OUT"].exists()
