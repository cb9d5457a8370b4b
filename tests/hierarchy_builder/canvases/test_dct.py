"""The basis of the weight-free encoder: exact where it keeps, silent where it drops, sane where it compares."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from hierarchy_builder.canvases.dct import DctBasis
from hierarchy_builder.images.decoding import crop_square

BASIS = DctBasis.default()


def flat(*colours: tuple[float, float, float]) -> torch.Tensor:
    """One 16 px patch of each colour (0..1), side by side: [1, 3, 16, 16·n]."""
    return torch.tensor(colours).T[None, :, None, :].repeat_interleave(16, 2).repeat_interleave(16, 3)


def cosine_distance(one: torch.Tensor, two: torch.Tensor) -> float:
    return float(1 - torch.nn.functional.cosine_similarity(one, two, dim=-1))


@settings(max_examples=20, deadline=None)
@given(arrays(np.uint8, (2, 2, 3)), st.integers(0, 2**32 - 1))
def test_features_survive_decoding_and_encoding(colours: np.ndarray, seed: int) -> None:
    # Patches of one colour with little texture, well inside the gamut, are recovered exactly.
    base = torch.from_numpy(colours).double().permute(2, 0, 1)[None] / 255 * 0.4 + 0.3
    images = base.repeat_interleave(16, 2).repeat_interleave(16, 3).float()
    images = images + 0.02 * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    features = BASIS(images)
    assert features.shape == (1, 2, 2, 48)
    assert torch.allclose(BASIS(BASIS.inverse(features)), features, atol=2e-3)


def test_decoding_is_a_projection(shared: object) -> None:
    path = shared / "data/bsds500-val/images/3096.jpg"  # type: ignore[operator]
    image = torch.from_numpy(crop_square(Image.open(path), 256)).permute(2, 0, 1)[None] / 255
    once = BASIS.inverse(BASIS(image))
    assert once.shape == image.shape
    assert float(((once - image) ** 2).mean()) < 10**-3  # above 30 dB on a calm photograph
    twice = BASIS.inverse(BASIS(once))
    assert float((twice - once).abs().mean()) < 1e-3  # not zero: where it left the gamut it was clamped


def test_oklab_has_its_published_values() -> None:
    # Ottosson (2020): white is (1, 0, 0); pure sRGB red is (0.628, 0.225, 0.126).
    lab = BASIS.to_oklab(flat((1.0, 1.0, 1.0), (1.0, 0.0, 0.0), (0.0, 0.0, 0.0)))[0, :, 0, ::16].T
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.62796, 0.22486, 0.12585], [0.0, 0.0, 0.0]])
    assert torch.allclose(lab, expected, atol=1e-3)


def test_colours_round_trip_to_the_nearest_of_256() -> None:
    values = torch.linspace(0, 1, 256)
    grey = values.expand(1, 3, 1, 256)
    assert torch.allclose(BASIS.to_rgb(BASIS.to_oklab(grey)), grey, atol=0.2 / 255)
    corners = torch.tensor([[r, g, b] for r in (0.0, 1.0) for g in (0.0, 1.0) for b in (0.0, 1.0)]).T[
        None, :, None
    ]
    assert torch.allclose(BASIS.to_rgb(BASIS.to_oklab(corners)), corners, atol=1e-3)


def test_the_mean_of_tokens_decodes_to_the_mean_patch() -> None:
    images = torch.rand((1, 3, 16, 64), generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    features = BASIS(images)
    mean_patch = BASIS.to_oklab(images).unflatten(3, (4, 16)).mean(3)
    kept = BASIS(BASIS.to_rgb(mean_patch))
    assert torch.allclose(features.mean(2, keepdim=True), kept, atol=1e-3)


def test_cosine_distance_differs_between_greys() -> None:
    levels = torch.linspace(0, 1, 6)
    tokens = BASIS(flat(*[(float(v),) * 3 for v in levels]))[0, 0]
    steps = [cosine_distance(tokens[i], tokens[i + 1]) for i in range(5)]
    assert min(steps) > 0.005
    assert cosine_distance(tokens[0], tokens[5]) > 0.9
    assert float(tokens.norm(dim=-1).min()) > 2.0


def test_texture_does_not_outweigh_colour() -> None:
    noise = torch.randn((2, 1, 16, 16), generator=torch.Generator().manual_seed(0)) * 0.05
    grey = BASIS((0.5 + noise).expand(2, 3, 16, 16).contiguous())[:, 0, 0]
    red = BASIS(flat((0.8, 0.3, 0.3)))[0, 0, 0]
    assert cosine_distance(grey[0], grey[1]) < 0.2 * cosine_distance(grey[0], red)


def test_basis_is_rebuilt_from_its_json_alone() -> None:
    spec = json.loads(json.dumps(BASIS.spec()))
    again = DctBasis.from_spec(spec)
    features = torch.randn((1, 2, 2, 48), generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.inverse(features), BASIS.inverse(features))
    for damage in (
        {"kind": "vae"},
        {"channels": [[0, 0]]},
        {"channels": [[0, 99, 0, 1.0, 0.0]]},
        {"patch_px": None},
    ):
        with pytest.raises(ValueError, match="not a description of a DCT basis"):
            DctBasis.from_spec(spec | damage)


def test_decoding_has_finite_gradients_at_black() -> None:
    features = BASIS(torch.zeros(1, 3, 16, 16)).requires_grad_()
    BASIS.inverse(features).sum().backward()
    assert torch.isfinite(features.grad).all()
