"""Encoders: the DINOv2 recipe on tiny weights, exported models, your own, and what each refuses."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from onnx_models import save_onnx

from hierarchy_builder.canvases.dct import DctBasis
from hierarchy_builder.encoders import Encoder, check_encoder, encode, list_encoders, load_encoder
from hierarchy_builder.encoders.probe import probe_pictures, probe_value
from hierarchy_builder.encoders.timm_vit import TimmEncoder, timm
from hierarchy_builder.errors import BuilderError, UsageError
from hierarchy_builder.machine.installing import install_extras

TINY = {"img_size": 56, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 0}


def pictures(count: int, size_px: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size_px, size_px, 3), dtype=np.uint8)


def tiny_dinov2() -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_reg4_dinov2", **TINY)
    with torch.no_grad():  # an affine and a layer scale that would be seen
        model.norm.weight.uniform_(0.5, 2.0)
        model.norm.bias.uniform_(-1.0, 1.0)
        for block in model.blocks:
            block.ls1.gamma.fill_(0.5)
            block.ls2.gamma.fill_(0.5)
    return model


def test_dinov2_tokens_are_patches_after_a_norm_without_affine() -> None:
    model, images = tiny_dinov2(), pictures(3, 56)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        pixels = ((torch.from_numpy(images) / 255 - mean) / std).permute(0, 3, 1, 2)
        normed = model.eval().forward_features(pixels)
        expected = ((normed - model.norm.bias) / model.norm.weight)[:, 5:].reshape(3, 4, 4, 64)
    encoder = TimmEncoder(model, name="tiny", weights_hash="")
    features = encoder.encode(images)
    assert (features.shape, features.dtype) == ((3, 4, 4, 64), np.float32)
    assert np.abs(features - expected.numpy()).max() < 1e-5
    assert np.abs(features.mean(-1)).max() < 1e-5
    assert np.abs(features.std(-1) - 1).max() < 1e-3
    assert (encoder.grid, encoder.width, encoder.image_size_px) == ((4, 4), 64, 56)
    assert np.abs(encoder.encode(images[1:2]) - features[1:2]).max() < 1e-5


def test_dinov2_reg_base_has_the_published_shape() -> None:
    encoder = load_encoder("dinov2-reg-small", weights="random:0", device="cpu")
    assert encoder.encode(pictures(1, 224)).shape == (1, 16, 16, 384)
    description = json.loads(json.dumps(encoder.describe()))
    assert description["name"] == "dinov2-reg-small"
    assert description["grid"] == [16, 16]
    assert description["normalisation"] == {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert description["decoder"] is None


def test_random_weights_depend_on_the_seed_only() -> None:
    state = torch.get_rng_state()
    hashes = [load_encoder("timm:test_vit", weights=f"random:{seed}").weights_hash for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_weight_file_of_another_resolution_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    published = timm.create_model("test_vit", num_classes=10)
    safetensors.torch.save_file(published.state_dict(), tmp_path / "vit.safetensors")
    torch.save(published.state_dict(), tmp_path / "vit.pth")
    one, two = (
        load_encoder("timm:test_vit", weights=str(tmp_path / name), device="cpu")
        for name in ("vit.safetensors", "vit.pth")
    )
    images = pictures(1, 160)
    assert np.array_equal(one.encode(images), two.encode(images))
    assert one.weights_hash != two.weights_hash
    assert one.grid == (10, 10)
    assert one.describe()["normalisation"]["mean"] == [0.5, 0.5, 0.5]
    published.norm = torch.nn.Identity()
    expected = TimmEncoder(published, name="", weights_hash="").encode(images)
    assert np.abs(one.encode(images) - expected).max() < 1e-5


def test_unusable_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    junk = tmp_path / "junk.pth"
    junk.write_bytes(b"junk")
    other = timm.create_model("test_vit", num_classes=0)
    safetensors.torch.save_file(other.state_dict(), tmp_path / "other.safetensors")
    endless: list[Any] = ["a"] * 10
    for _ in range(9):  # a small file, since it holds each list once
        endless = [endless] * 10
    torch.save({"a": endless}, tmp_path / "endless.pth")
    torch.save({"pos_embed": torch.zeros(1).expand(1, 10**12)}, tmp_path / "wide.pth")
    for weights, message in (
        (str(tmp_path / "wide.pth"), "pos_embed has 4,000,000,000,000 bytes in a file of "),
        (str(tmp_path / "endless.pth"), "'a' is a list, no tensor"),
        (str(junk), "does not hold the weights of test_vit2"),
        (str(tmp_path / "other.safetensors"), "does not hold the weights of test_vit2"),
        (str(tmp_path / "nowhere.pth"), "not found"),
        ("random:x", "expected random:SEED"),
    ):
        with pytest.raises(BuilderError, match=message) as caught:
            load_encoder("timm:test_vit2", weights=weights)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("offline", [True, False])
def test_hub_without_network_is_requested_once(monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    asked: list[str] = []

    def refuse(url: str, **_: Any) -> None:
        asked.append(url)
        raise OSError("Name or service not known")

    def not_cached(**options: Any) -> str:
        assert options["local_files_only"], "nothing may be downloaded before the hub has answered"
        raise FileNotFoundError

    hub = "hierarchy_builder.encoders.timm_vit.hub."
    monkeypatch.setattr(hub + "constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hub + "hf_hub_download", not_cached)
    monkeypatch.setattr(hub + "get_hf_file_metadata", refuse)
    with pytest.raises(
        BuilderError, match=r"timm/vit_base_patch14_reg4_dinov2.*pass --weights FILE"
    ) as caught:
        load_encoder("dinov2-reg-base")
    assert len(asked) == (0 if offline else 1)
    assert ("HF_HUB_OFFLINE is set" if offline else "Name or service not known") in str(caught.value)


def test_models_without_patches_are_refused() -> None:
    with pytest.raises(UsageError, match="ResNet has no patch tokens"):
        load_encoder("timm:resnet18", weights="random:0")
    with pytest.raises(UsageError, match="did you mean 'vit_tiny_patch16_224"):
        load_encoder("timm:vit_tiny_patch16_22", weights="random:0")


@pytest.mark.cuda
def test_bfloat16_on_cuda_stays_close() -> None:
    images = pictures(2, 224)
    exact = load_encoder("dinov2-reg-small", weights="random:0", device="cpu").encode(images)
    fast = load_encoder("dinov2-reg-small", weights="random:0", device="cuda").encode(images)
    assert (fast.dtype, fast.shape) == (exact.dtype, exact.shape)
    assert np.abs(fast - exact).mean() < 0.02


def test_halves_are_the_rounded_features() -> None:
    encoder = TimmEncoder(tiny_dinov2(), name="tiny", weights_hash="")
    with np.errstate(over="ignore"):
        expected = encode(encoder, pictures(2, 56)).astype(np.float16)
    np.testing.assert_array_equal(encode(encoder, pictures(2, 56), half=True), expected)


def test_bfloat16_returns_normalised_float32() -> None:
    model = tiny_dinov2()
    exact = TimmEncoder(model, name="", weights_hash="").encode(pictures(1, 56))
    fast = TimmEncoder(tiny_dinov2(), name="", weights_hash="", precision="bfloat16").encode(pictures(1, 56))
    assert fast.dtype == np.float32
    assert 0 < np.abs(fast - exact).mean() < 0.05


# dct


def test_dct_is_declared_and_decodes_from_its_description() -> None:
    encoder = load_encoder("dct", device="cpu")
    images = np.broadcast_to(np.uint8([40, 120, 200]), (2, 256, 256, 3)).copy()
    features = encoder.encode(images)
    assert (features.shape, features.dtype) == ((2, 16, 16, 48), np.float32)
    description = json.loads(json.dumps(encoder.describe()))
    decoded = DctBasis.from_spec(description["decoder"]).inverse(torch.from_numpy(features))
    assert np.abs(decoded.permute(0, 2, 3, 1).numpy() * 255 - images).max() < 0.5
    with pytest.raises(UsageError, match="dct takes no weight file"):
        load_encoder("dct", weights="some.pth")


# onnx


def test_onnx_runs_a_real_encoder(shared: Path) -> None:
    path = shared / "data/encoders/deeplab_mobilenetv2_voc.onnx"
    encoder = load_encoder(f"onnx:{path}:aspp_256", device="cpu")
    assert encoder.describe()["output"] == "aspp_256"
    assert (encoder.image_size_px, encoder.grid, encoder.width) == (256, (16, 16), 256)
    images = pictures(3, 256)
    features = encoder.encode(images)
    assert np.abs(encoder.encode(images[2:]) - features[2:]).max() < 1e-4
    assert load_encoder(f"onnx:{path}:s16_96").width == 96
    assert str(path.parent) not in json.dumps(encoder.describe())
    with pytest.raises(UsageError, match="unknown output 'nope', known are s16_96, s16_320"):
        load_encoder(f"onnx:{path}:nope")


def test_onnx_takes_the_one_map_that_fits_and_normalises(tmp_path: Path) -> None:
    path = save_onnx(tmp_path / "m.onnx", {"late": 64, "scores": 10})
    encoder = load_encoder(f"onnx:{path}")
    assert (encoder.describe()["output"], encoder.width, encoder.image_size_px) == ("late", 64, 256)
    images = pictures(2, 256)
    expected = images[:, ::16, ::16, 0] / 127.5 - 1
    assert np.abs(encoder.encode(images)[..., 0] - expected).max() < 1e-5
    assert "takes output late (it is the one that fits)" in encoder.choices()
    assert "mean 0.5,0.5,0.5 and std 0.5,0.5,0.5 (the default)" in encoder.choices()


def test_onnx_asks_where_several_outputs_fit(tmp_path: Path) -> None:
    path = save_onnx(tmp_path / "m.onnx", {"early": 128, "late": 64, "scores": 10})
    with pytest.raises(UsageError, match=r"has 2 outputs that fit.*early \['N', 128.*--encoder onnx:.*:late"):
        load_encoder(f"onnx:{path}")
    named = load_encoder(f"onnx:{path}:late")
    assert (named.name, named.describe()["output"]) == ("onnx:m.onnx:late", "late")
    really = load_encoder(f"onnx:{save_onnx(tmp_path / 'l.onnx', {'last': 64, 'late': 64})}:last")
    assert (really.name, really.describe()["output"]) == ("onnx:l.onnx:last", "last")
    assert "takes output late (the name)" in named.choices()
    earlier = load_encoder(f"onnx:{path}:last")  # as a build from before the question
    assert (earlier.name, earlier.describe()["output"]) == ("onnx:m.onnx", "late")


def test_onnx_follows_its_metadata_and_static_shapes(tmp_path: Path) -> None:
    path = save_onnx(
        tmp_path / "m.onnx", {"a": 64, "b": 64}, size=32, batch=2, mean="0,0,0", std="1,1,1", output="a"
    )
    encoder = load_encoder(f"onnx:{path}")
    assert (encoder.image_size_px, encoder.grid, encoder.describe()["output"]) == (32, (2, 2), "a")
    images = pictures(5, 32)
    assert np.abs(encoder.encode(images)[..., 0] - images[:, ::16, ::16, 0] / 255).max() < 1e-5
    broken = save_onnx(tmp_path / "b.onnx", {"a": 64}, mean="0.5")
    with pytest.raises(UsageError, match=r"metadata mean is '0\.5', expected three numbers"):
        load_encoder(f"onnx:{broken}")


def test_unusable_onnx_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    with pytest.raises(BuilderError, match="is not a model that onnxruntime can run"):
        load_encoder(f"onnx:{tmp_path}/junk.onnx")
    with pytest.raises(BuilderError, match=r"file '.*nowhere\.onnx' not found"):
        load_encoder(f"onnx:{tmp_path}/nowhere.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BuilderError, match=re.escape(install_extras("onnx"))):
        load_encoder(f"onnx:{tmp_path}/junk.onnx")


# Your own


class MeanColour:
    """Mean colour of 16 px patches."""

    name = "mean-colour"
    image_size_px = 64
    grid = (4, 4)
    width = 3
    weights_hash = "none"

    def encode(self, images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), 4, 16, 4, 16, 3).mean((2, 4)).astype(np.float32)

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "image_size_px": self.image_size_px,
            "grid": list(self.grid),
            "width": self.width,
            "normalisation": None,
            "weights_hash": self.weights_hash,
            "decoder": None,
        }


def own(**changes: Any) -> Callable[[], object]:
    return lambda: type("Changed", (MeanColour,), changes)()


def failing() -> object:
    raise RuntimeError("no such checkpoint")


def one_token() -> object:
    return own(grid=(1, 1), encode=lambda self, images: np.zeros((len(images), 1, 1, 3), np.float32))()


def test_custom_encoder_is_loaded_by_name() -> None:
    encoder = load_encoder(f"{__name__}:MeanColour")
    assert isinstance(encoder, Encoder)
    assert encoder.name == "mean-colour"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: object(), "returned object without name, image_size_px"),
        (
            own(width=7),
            r"returned \(1, 4, 4, 3\) float32 for 1 images of 64 px, expected \(1, 4, 4, 7\) float32",
        ),
        (own(encode=lambda self, images: np.zeros((1, 4, 4, 3))), "float64 for 1 images of 64 px, expected"),
        (own(encode=lambda self, images: [1]), r"returned None list"),
        (own(encode=lambda self, images: 1 / 0), "failed on a batch of 1 images: ZeroDivisionError"),
        (own(image_size_px="64"), "expected positive integers and a tuple"),
        (own(grid=16), "expected positive integers and a tuple"),
        (own(describe=lambda self: None), "must return a dict that JSON can hold"),
        (own(describe=lambda self: {"name": np.float32(1)}), "must return a dict that JSON can hold"),
        (own(describe=lambda self: {"name": "mine"}), r"describe\(\) has no decoder, grid, image_size_px"),
    ],
)
def test_custom_encoder_is_checked(make: Callable[[], object], message: str) -> None:
    with pytest.raises(BuilderError, match=message):
        check_encoder(make(), "mine:make")


def test_encoder_that_drops_images_of_a_batch_is_refused() -> None:
    make = own(encode=lambda self, images: MeanColour.encode(self, images[:1]))
    with pytest.raises(BuilderError, match=r"returned \(1, 4, 4, 3\) float32 for 3 images of 64 px"):
        encode(make(), np.zeros((3, 64, 64, 3), np.uint8))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dinov2-reg-bas", "unknown encoder 'dinov2-reg-bas': did you mean 'dinov2-reg-base'"),
        ("dinov2-reg-tiny", "did you mean 'dinov2-reg-"),
        ("resnet", "known are dinov2-reg-small"),
        ("no_such_module:make", "No module named 'no_such_module'; expected module:function"),
        ("json:no_such_function", "module json has no function 'no_such_function'"),
        (":make", "Empty module name; expected module:function"),
        (".relative:make", "expected module:function"),
        (f"{__name__}:one_token", "gives one token per image, expected a grid"),
        (f"{__name__}:failing", "calling it failed: RuntimeError: no such checkpoint"),
    ],
)
def test_unknown_encoder_name_is_refused(name: str, message: str) -> None:
    with pytest.raises(BuilderError, match=message):
        load_encoder(name)


def test_every_listed_name_is_unique_and_says_what_it_needs() -> None:
    rows = list_encoders()
    assert len({row.name for row in rows}) == len(rows) >= 12
    assert {(row.name, row.width) for row in rows} >= {
        ("dinov2-reg-base", 768),
        ("dct", 48),
        ("onnx:FILE[:OUTPUT]", None),
    }
    for row in rows:
        if row.name.startswith("dinov2"):
            assert timm.models.get_pretrained_cfg(load_name(row.name)).hf_hub_id.startswith("timm/")


def load_name(name: str) -> str:
    size, registers = name.rpartition("-")[2], "_reg4" if "-reg-" in name else ""
    return f"vit_{size}_patch14{registers}_dinov2"


# Probe


def test_probe_depends_on_weights() -> None:
    encoder = load_encoder("dct", device="cpu")
    value = probe_value(encoder)
    assert len(value) == 12
    assert value == probe_value(encoder)
    assert all(np.isfinite(value))
    assert value == [float(f"{number:.4e}") for number in value]
    tiny = [TimmEncoder(tiny_dinov2(), name="", weights_hash="") for _ in range(2)]
    with torch.no_grad():
        tiny[1].model.blocks[1].mlp.fc1.weight *= 1.1
    assert probe_value(tiny[0]) != probe_value(tiny[1])


def test_probe_images_are_fixed() -> None:
    ramp, board, noise = probe_pictures()
    assert ramp.shape == board.shape == noise.shape == (375, 500, 3)
    assert ramp[374, 128].tolist() == [254, 65, 146]
    assert board[200, 100].tolist() == [14 * 37 % 256, 14 * 91 % 256, 14 * 53 % 256]
    assert len(np.unique(board.reshape(-1, 3), axis=0)) > 20
    assert len(np.unique(noise.reshape(-1, 3), axis=0)) > 180_000
