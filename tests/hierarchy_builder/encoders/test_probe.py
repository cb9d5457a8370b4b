"""The probe of an encoder: what it sees, what it lets pass, and what ends a build with exit code 5."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from pictures import write_tree
from PIL import Image
from typer.testing import CliRunner

from hierarchy_builder.build import pipeline as steps
from hierarchy_builder.build.workers import Workers
from hierarchy_builder.cli import app as cli
from hierarchy_builder.config import ExtractConfig
from hierarchy_builder.encoders import load_encoder, probe
from hierarchy_builder.encoders.probe import (
    REFERENCES,
    TOLERANCES,
    agrees,
    check_probe,
    probe_report,
    probe_value,
)
from hierarchy_builder.encoders.timm_vit import TimmEncoder, timm
from hierarchy_builder.errors import BuilderError, ConfigMismatchError
from hierarchy_builder.progress import Reporter
from hierarchy_builder.store.folder import BuildFolder
from hierarchy_builder.store.ledger import stage_entry

SESSION = steps.Session(workers=Workers(count=0), reporter=Reporter(quiet=True))


def tiny_vit(change: Callable[[Any], None] = lambda model: None, precision: str = "float32") -> TimmEncoder:
    """DINOv2 with registers, small and untrained but for an affine norm and layer scales that count."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_small_patch14_reg4_dinov2", img_size=56, embed_dim=64, depth=3, num_heads=2, num_classes=0
    )
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 2.0)
        for block in model.blocks:
            block.ls1.gamma.fill_(0.5)
            block.ls2.gamma.fill_(0.5)
        change(model)
    return TimmEncoder(model, name="tiny", weights_hash="same", precision=precision)


# What it sees


def drop_last_layer(model: Any) -> None:
    model.blocks = model.blocks[:-1]


def other_weights(model: Any) -> None:
    for block in model.blocks:  # as another training run would leave them
        torch.nn.init.trunc_normal_(block.mlp.fc1.weight, std=0.02)


def other_mean(model: Any) -> None:
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def other_norm(model: Any) -> None:
    model.blocks[0].norm1 = torch.nn.Identity()


@pytest.mark.parametrize(
    "change", [drop_last_layer, other_weights, other_mean, other_norm], ids=lambda change: change.__name__
)
def test_probe_detects_a_changed_encoder(change: Callable[[Any], None]) -> None:
    right, wrong = probe_value(tiny_vit()), tiny_vit(change)
    assert check_probe(tiny_vit(), probe_value(tiny_vit()), "float32", right) == "recorded"
    with pytest.raises(BuilderError, match="no numbers"):
        check_probe(tiny_vit(), [float("nan"), *right[1:]], "float32", None)
    with pytest.raises(ConfigMismatchError, match=r"the first run of this build(.|\n)*expected(.|\n)*found"):
        check_probe(wrong, probe_value(wrong), "float32", right)


@pytest.mark.parametrize("resampling", [Image.Resampling.BILINEAR, Image.Resampling.NEAREST])
def test_probe_detects_a_changed_resize(
    monkeypatch: pytest.MonkeyPatch, resampling: Image.Resampling
) -> None:
    right = {name: probe_value(encoder) for name, encoder in encoders().items()}
    monkeypatch.setattr(probe, "crop_square", partial(probe.crop_square, resampling=resampling))
    for name, encoder in encoders().items():
        assert not agrees(probe_value(encoder), right[name], "float32"), name


def encoders() -> dict[str, Any]:
    return {"dct": load_encoder("dct", device="cpu"), "tiny": tiny_vit()}


def test_probe_tolerates_rounding_of_each_precision() -> None:
    exact = probe_value(tiny_vit())
    rounded = probe_value(tiny_vit(precision="bfloat16"))
    assert agrees(rounded, exact, "bfloat16")
    assert not agrees(rounded, exact, "float32")
    for precision, tolerance in TOLERANCES.items():
        nearly = [exact[0] * (1 + 0.9 * tolerance), exact[1] + 0.9 * tolerance, *exact[2:]]
        too_far = [exact[0] * (1 + 1.1 * tolerance), *exact[1:]]
        assert agrees(nearly, exact, precision)
        assert not agrees(too_far, exact, precision)
    assert not agrees(exact[:8], exact, "bfloat16")


# References


def test_references_are_well_formed() -> None:
    for (weights_hash, _), value in REFERENCES.items():
        assert re.fullmatch(r"[0-9a-f]{64}", weights_hash)
        assert len(value) == 12
        assert np.isfinite(value).all()


def test_probe_of_dct_agrees_with_its_reference() -> None:
    encoder = load_encoder("dct", device="cpu")
    assert check_probe(encoder, probe_value(encoder), "float32", None) == "reference"
    report = probe_report("dct")
    assert (report["verdict"], report["weights_hash"]) == ("agrees", encoder.weights_hash)


def test_known_weights_with_another_probe_value_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encoder = load_encoder("dct", device="cpu")
    reference = REFERENCES[encoder.weights_hash, ""]
    monkeypatch.setitem(probe.REFERENCES, (encoder.weights_hash, ""), (reference[0] * 1.01, *reference[1:]))
    photos = write_tree(tmp_path / "photos", per_class=1)
    with pytest.raises(ConfigMismatchError, match="the reference of these weights") as caught:
        steps.extract(BuildFolder(tmp_path / "build"), str(photos), ExtractConfig(encoder="dct"), SESSION)
    assert caught.value.exit_code == 5
    assert not (tmp_path / "build" / "features.zarr").exists()
    assert probe_report("dct")["verdict"] == "DIFFERS"


def test_probe_command_prints_the_reference(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["encoders", "--probe", "dct", "--json"])
    (row,) = json.loads(done.stdout)
    assert np.allclose(row["value"], REFERENCES[row["weights_hash"], row["output"]], rtol=1e-4)
    safetensors.torch.save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    words = ["encoders", "--probe", "timm:test_vit", "--weights", str(tmp_path / "vit.safetensors"), "--json"]
    (row,) = json.loads(CliRunner().invoke(cli.app, words).stdout)
    assert (row["verdict"], len(row["value"])) == ("unknown weights", 12)


# Unknown weights


class Gain:
    """Nobody's encoder, with weights that no hash tells apart."""

    name, image_size_px, grid, width, weights_hash = "gain", 32, (2, 2), 3, "nothing"
    factor = 1.0

    def encode(self, images: np.ndarray) -> np.ndarray:
        means = images.reshape(len(images), 2, 16, 2, 16, 3).mean(axis=(2, 4))
        return (means * self.factor).astype(np.float32)

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name, "image_size_px": 32, "grid": [2, 2], "width": 3, "normalisation": None,
            "weights_hash": self.weights_hash, "decoder": None,
        }  # fmt: skip


def test_unknown_weights_are_compared_with_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, folder = write_tree(tmp_path / "photos", per_class=4), BuildFolder(tmp_path / "build")
    config = ExtractConfig(encoder="test_probe:Gain", block_rows=4)
    loud = replace(SESSION, reporter=Reporter())
    steps.extract(folder, str(photos), config, loud)
    assert "no reference value is known for these weights" in capsys.readouterr().err
    recorded = stage_entry(folder, "extract")["probe"]
    assert recorded == probe_value(Gain())
    (folder.ledger("extract") / "000001.json").unlink()
    monkeypatch.setattr(Gain, "factor", 1.01)
    with pytest.raises(ConfigMismatchError, match="the first run of this build") as caught:
        steps.extract(folder, str(photos), config, SESSION)
    assert caught.value.exit_code == 5
    assert stage_entry(folder, "extract")["probe"] == recorded
    assert not (folder.ledger("extract") / "000001.json").exists()
    monkeypatch.setattr(Gain, "factor", 1.0001)  # another machine
    steps.extract(folder, str(photos), config, SESSION)
    assert stage_entry(folder, "extract")["probe"] == recorded, "drift does not add up"
    monkeypatch.setattr(Gain, "factor", 1.01)
    steps.extract(folder, str(photos), config, replace(SESSION, fresh=True))
    assert stage_entry(folder, "extract")["probe"] != recorded


# Position embedding


def test_positions_of_518_px_are_resampled_to_224_px_as_pillow_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """37×37 → 16×16, bicubic with antialias: Pillow's filter, which widens with the scale, is an independent one."""
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, embed_dim=64, depth=1, num_heads=2))
    torch.manual_seed(0)
    published = timm.create_model("vit_base_patch14_reg4_dinov2", pretrained=False)
    torch.nn.init.normal_(published.pos_embed)
    assert published.pos_embed.shape[1] == 37 * 37, "class and register tokens have no position"
    safetensors.torch.save_file(published.state_dict(), tmp_path / "dinov2.safetensors")
    encoder: Any = load_encoder("dinov2-reg-base", weights=str(tmp_path / "dinov2.safetensors"), device="cpu")
    assert encoder.grid == (16, 16)
    ours = encoder.model.pos_embed.detach().reshape(16, 16, 64).numpy()
    planes = published.pos_embed.detach().reshape(37, 37, 64).numpy()
    resized = {
        filter_: np.stack(
            [np.asarray(Image.fromarray(plane).resize((16, 16), filter_)) for plane in planes.T], -1
        )
        for filter_ in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS)
    }
    error = {filter_: np.abs(ours.swapaxes(0, 1) - values).max() for filter_, values in resized.items()}
    assert error[Image.Resampling.BICUBIC] < 1e-5
    assert min(error[Image.Resampling.BILINEAR], error[Image.Resampling.LANCZOS]) > 0.05
