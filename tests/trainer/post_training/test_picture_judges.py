"""Judges of pictures: pre-processing, files of statistics, what they refuse, and post-training and ratios by them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import SETTINGS, cli
from torch.nn import functional as F

from hierarchy_builder.errors import MismatchError, TrainerError, UsageError
from hierarchy_builder.machine.vision_libraries import import_vision
from trainer.post_training import judges
from trainer.post_training.bundle import read_statistics
from trainer.post_training.judges import (
    KNOWN,
    Known,
    TimmJudge,
    load_judges,
    parse_judges,
    pooled,
    resized_as_tensorflow,
)

CPU = torch.device("cpu")


def test_names_carry_weights_and_sim_stands_for_three() -> None:
    assert parse_judges(["sim", "dct=0.5"]) == {"siglip": 1.0, "mae": 1.0, "inception": 1.0, "dct": 0.5}
    for text in ("mae=", "mae=-1", "mae=x", "=2"):
        with pytest.raises(UsageError, match="expected NAME or NAME=WEIGHT with a weight above 0"):
            parse_judges([text])
    with pytest.raises(UsageError, match="judge mae is named twice"):
        parse_judges(["sim", "mae"])


def test_a_network_of_timm_sees_what_the_paper_describes(tmp_path: Path) -> None:
    timm = import_vision("timm")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1).eval()
    save_file(dict(model.state_dict()), tmp_path / "whole.safetensors")
    known = Known("vit_tiny_patch16_224", of_validation=1.0, size_px=64)
    with pytest.raises(TrainerError, match=r"no weights of vit_tiny_patch16_224 from .*whole"):
        TimmJudge("tiny", known, str(tmp_path / "whole.safetensors"))  # it lacks eleven of twelve blocks
    torch.save({"blocks": np.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(TrainerError, match="no part of a tensor"):
        TimmJudge("tiny", known, str(tmp_path / "other.pth"))
    full = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    save_file(dict(full.state_dict()), tmp_path / "full.safetensors")
    judge = TimmJudge("tiny", known, str(tmp_path / "full.safetensors"))
    pictures = torch.rand(2, 3, 32, 32, requires_grad=True)
    resized = F.interpolate(pictures, (64, 64), mode="bicubic", align_corners=False, antialias=True)
    mean, std = (torch.tensor(full.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    torch.testing.assert_close(judge(pictures), full.forward_features((resized - mean) / std)[:, 0])
    judge(pictures)[:, 0].sum().backward()
    assert pictures.grad is not None
    assert pictures.grad.abs().max() > 0
    assert not any(p.requires_grad for p in judge.parameters())


def test_tokens_become_one_vector_by_class_token_attention_or_mean() -> None:
    class Model:
        num_prefix_tokens = 1
        attn_pool: Any = None

    model, tokens = Model(), torch.rand(2, 5, 3)
    assert torch.equal(pooled(model, tokens, "cls"), tokens[:, 0])
    assert torch.equal(pooled(model, tokens, "mean"), tokens[:, 1:].mean(dim=1))
    model.num_prefix_tokens, model.attn_pool = 0, lambda x: x[:, -1]
    assert torch.equal(pooled(model, tokens, "cls"), tokens[:, -1])
    assert torch.equal(pooled(model, torch.ones(2, 3, 4, 4), "mean"), torch.ones(2, 3))


def test_inception_resizes_from_the_corner_as_tensorflow_does() -> None:
    row = torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(1, 1, 4, 4)
    wide = resized_as_tensorflow(row, 8)
    assert wide[0, 0, 0].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0]
    assert torch.equal(resized_as_tensorflow(row, 4), row)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    content = {
        "data/" + KNOWN["mae"].statistics: {"mu": np.arange(2.0), "sigma": np.eye(2, dtype=np.float32)},
        "other.npz": {"mu": np.zeros(2)},
    }
    path = tmp_path / "refs.pkl"
    path.write_bytes(pickle.dumps(content))
    return path


def test_the_bundle_of_the_release_yields_arrays(bundle: Path) -> None:
    found = read_statistics(bundle, KNOWN["mae"].statistics)
    assert found.mean.tolist() == [0.0, 1.0]
    assert found.covariance.dtype == np.float64
    with pytest.raises(TrainerError, match=r"expected absent\.npz"):
        read_statistics(bundle, "absent.npz")
    with pytest.raises(TrainerError, match=r"other\.npz: holds \['mu'\], expected mu and sigma"):
        read_statistics(bundle, "other.npz")


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must not run",))


@pytest.mark.parametrize("content", [{"x.npz": Malicious()}, {"x.npz": {"mu": np.array([Malicious()])}}])
def test_a_bundle_that_names_a_function_is_refused_and_nothing_runs(
    content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "refs.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(TrainerError, match=r"it names builtins.print, which is no array; expected arrays"):
        read_statistics(tmp_path / "refs.pkl", "x.npz")
    assert capsys.readouterr().out == ""


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    for data in (b"", b"not a pickle", pickle.dumps([1, 2])):
        (tmp_path / "refs.pkl").write_bytes(data)
        with pytest.raises(TrainerError, match="reference statistics"):
            read_statistics(tmp_path / "refs.pkl", "x.npz")


def test_judges_refuse_files_of_others_and_statistics_of_another_width(tmp_path: Path) -> None:
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(UsageError, match="a file is given for the judge mae, the judges are dct"):
        load_judges(["dct"], {"mae": "x"}, {}, CPU, True)
    with pytest.raises(MismatchError, match="are of 5 numbers, the judge dct describes a picture by 48"):
        load_judges(["dct"], {}, {"dct": str(tmp_path / "narrow.npz")}, CPU, True)
    with pytest.raises(
        TrainerError, match=r"judge mae: no weights of vit_large_patch16_224.mae from .*absent"
    ):
        load_judges(["mae"], {"mae": str(tmp_path / "absent.pth")}, {}, CPU, True)


def test_an_encoder_without_a_gradient_judges_but_does_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind:
        name, image_size_px = "blind", 4

        def encode(self, images: np.ndarray) -> np.ndarray:
            return images.astype(np.float32)[:, ::2, ::2]

    monkeypatch.setattr(judges, "load_own_encoder", lambda name, file: Blind())
    with pytest.raises(UsageError, match="has no method `tokens`"):
        load_judges(["some:encoder"], {}, {}, CPU, True)
    (judge,) = load_judges(["some:encoder"], {}, {}, CPU, False)
    assert judge.describe(torch.ones(2, 3, 8, 8)).tolist() == [[255.0] * 3] * 2


def test_a_judge_trains_and_ratios_say_so(tiny_build: Any, tmp_path: Path) -> None:
    """On the command line: a run of `dct` features, whose pictures the same encoder looks at."""
    shards, run, out = tiny_build.root, tmp_path / "run", tmp_path / "out"
    small = ["--total-images", "8", "--batch-size", "4", "--quiet", "--set", "sample_images=null"]
    assert cli("trainer", "train", shards, "--out", run, "--preset", "tiny-cpu", *SETTINGS, *small).code == 0
    words = ["--no-levels", "--judge", "dct=2", *small, "--set", "queue_images=8", "--json"]
    done = cli("trainer", "post-train", run, "--shards", shards, "--out", out, *words)
    assert done.code == 0, done.err
    assert done.json["step"] == 2
    metrics = (out / "metrics.jsonl").read_text()
    assert '"fd_dct"' in metrics
    assert "fd_tokens" not in metrics
    asked = ["--shards", shards, "--samples-per-class", "2", "--fdr", "dct", "--quiet"]
    rows = cli("trainer", "evaluate", out, *asked, "--json").json
    assert [(row["judge"], row["trained_on"], row["num_samples"]) for row in rows] == [("dct", True, 6)]
    assert rows[0]["ratio"] == pytest.approx(rows[0]["frechet"] / rows[0]["of_validation"])
    assert cli("trainer", "evaluate", run, *asked, "--json").json[0]["trained_on"] is False
    refused = cli(
        "trainer", "post-train", run, "--shards", shards, "--out", out, *words, "--judge-file", "dct"
    )
    assert refused.code == 2
    assert "--judge-file dct: expected NAME=FILE" in refused.err
