"""`NAME@K`: the tokens of a vision transformer after its first K blocks, and the same by ONNX on real weights."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import skimage
import torch
from PIL import Image

from hierarchy_builder.encoders import load_encoder, timm_vit
from hierarchy_builder.errors import UsageError
from hierarchy_builder.images.decoding import crop_square

WHOLE = "timm:vit_tiny_patch16_224"


def pictures(count: int, size_px: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size_px, size_px, 3), dtype=np.uint8)


def photographs(size_px: int) -> np.ndarray:
    """Photographs that scikit-image ships, cropped like those of a build."""
    folder = Path(skimage.__file__).parent / "data"
    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
    return np.stack([crop_square(Image.open(folder / name).convert("RGB"), size_px) for name in names])


def cubic_matrix(old: int, new: int, scale: float) -> np.ndarray:
    """Weights of bicubic resampling with a = −0.75 and repeated borders: float64 [new, old]."""
    matrix = np.zeros((new, old))
    for row in range(new):
        place = (row + 0.5) / scale - 0.5
        for near in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            d = abs(place - near)
            inner, outer = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[row, np.clip(near, 0, old - 1)] += inner if d <= 1 else outer
    return matrix


def test_tokens_are_those_of_the_block_after_a_norm_without_affine() -> None:
    images = pictures(1, 224)
    features = load_encoder(f"{WHOLE}@3", weights="random:0", device="cpu").encode(images)
    whole = load_encoder(WHOLE, weights="random:0", device="cpu")
    kept: list[torch.Tensor] = []
    whole.model.blocks[2].register_forward_hook(lambda module, inputs, output: kept.append(output))
    whole.encode(images)
    tokens = kept[0][:, 1:].unflatten(1, whole.grid)
    expected = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=whole.epsilon)
    np.testing.assert_allclose(features, expected.numpy(), atol=1e-5)


def test_all_blocks_by_number_are_the_whole_network() -> None:
    images = pictures(1, 224)
    by_number = load_encoder(f"{WHOLE}@12", weights="random:0", device="cpu")
    whole = load_encoder(WHOLE, weights="random:0", device="cpu")
    np.testing.assert_array_equal(by_number.encode(images), whole.encode(images))


def test_the_number_of_blocks_is_part_of_the_identity() -> None:
    by_name = {
        name: load_encoder(name, weights="random:0", device="cpu").describe()
        for name in (WHOLE, f"{WHOLE}@3", f"{WHOLE}@4")
    }
    assert len({str(description) for description in by_name.values()}) == 3
    assert "output" not in by_name[WHOLE]  # as in builds of versions that kept all blocks
    assert by_name[f"{WHOLE}@3"]["output"] == "block 3"


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("0", r"the network has 12: expected @1 to @12"),
        ("13", r"the network has 12: expected @1 to @12"),
        ("", "expected a number of blocks"),
        ("-1", "expected a number of blocks"),
        ("nine", "expected a number of blocks"),
    ],
)
def test_blocks_that_do_not_exist_are_refused(blocks: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_encoder(f"{WHOLE}@{blocks}", weights="random:0", device="cpu")


def test_a_block_that_does_not_exist_is_refused_before_weights_are_sought() -> None:
    with pytest.raises(UsageError, match=r"the network has 12: expected @1 to @12"):
        load_encoder("dinov2-small@13", weights="no_such_file.safetensors", device="cpu")


def test_timm_and_onnx_agree_on_real_weights(tmp_path: Path) -> None:
    folder = Path(os.environ.get("REAL_WEIGHTS", ""))
    weights, exported = folder / "dinov2_small.safetensors", folder / "vit_small_9.onnx"
    if not os.environ.get("REAL_WEIGHTS") or not weights.exists() or not exported.exists():
        pytest.skip("REAL_WEIGHTS does not name a folder with dinov2_small.safetensors and vit_small_9.onnx")
    images = photographs(224)
    # timm resizes position embeddings with antialiasing, as DINOv2 with registers does; the exported graph does not.
    state = safetensors.torch.load_file(weights)
    first, grid = state["pos_embed"].split([1, 37 * 37], dim=1)
    grid = grid.unflatten(1, (37, 37)).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(16, 16), mode="bicubic", align_corners=False)
    state["pos_embed"] = torch.cat([first, grid.flatten(2).mT], dim=1)
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    by_timm = load_encoder("dinov2-small@9", weights=str(tmp_path / "weights.safetensors"), device="cpu")
    by_onnx = load_encoder(f"onnx:{exported}:tokens", device="cpu")
    assert (by_timm.grid, by_timm.width) == (by_onnx.grid, by_onnx.width) == ((16, 16), 384)
    assert np.abs(by_timm.encode(images) - by_onnx.encode(images)).max() < 1e-3


def test_original_positions_are_resized_without_antialiasing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = timm_vit.timm.create_model("vit_small_patch14_dinov2", num_classes=0, depth=1)
    positions = torch.randn(1, 1 + 37**2, 384)
    safetensors.torch.save_file(
        {**whole.state_dict(), "pos_embed": positions}, tmp_path / "weights.safetensors"
    )
    plain, original = (
        timm_vit._model_with_weights(
            name, "vit_small_patch14_dinov2", tmp_path / "weights.safetensors", {"img_size": 224, "depth": 1}
        )
        for name in ("dinov2-small", "dinov2-original-small")
    )
    matrix = cubic_matrix(37, 16, 16.1 / 37)
    grid = positions[0, 1:].unflatten(0, (37, 37)).double().numpy()
    expected = np.einsum("ai,bj,ijc->abc", matrix, matrix, grid).reshape(256, 384)
    np.testing.assert_allclose(original.pos_embed[0, 1:].detach(), expected, atol=1e-4)
    assert torch.equal(original.pos_embed[0, 0], positions[0, 0])
    assert (plain.pos_embed - original.pos_embed).abs().max() > 0.1
    names = ("dinov2-small@1", "dinov2-original-small@1")
    found = [load_encoder(name, weights="random:0", device="cpu").describe() for name in names]
    assert [description.get("positions") for description in found] == [None, "original"]
