"""Decoders: RAE's against its own numbers, the dct inverse from a description, and clear refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from released import GOLDEN

from hierarchy_builder.canvases.dct import DctBasis
from hierarchy_builder.errors import MismatchError, TrainerError, UsageError
from trainer.decode.rae import (
    RaeDecoder,
    RaeDecoderConfig,
    decoder_from_spec,
    load_decoder,
    load_rae_decoder,
    rae_state,
    to_uint8,
)


@pytest.fixture
def golden() -> Path:
    return GOLDEN / "rae_decoder_tiny"


@pytest.fixture
def canvases(golden: Path) -> torch.Tensor:
    return torch.from_numpy(np.load(golden / "io.npz")["z"]).permute(0, 2, 3, 1)


def test_rae_decoder_gives_the_release_numbers(golden: Path, canvases: torch.Tensor) -> None:
    expected = np.load(golden / "io.npz")
    decoder = load_rae_decoder(golden / "model.pt", golden / "config.json")
    # Same float32 operations in another order: differences seen are below 1e-6.
    assert np.abs(decoder.logits(canvases).numpy() - expected["logits"]).max() < 1e-5
    assert np.abs(decoder(canvases).numpy() - expected["image"]).max() < 1e-5
    assert not any(p.requires_grad for p in decoder.parameters())


def test_decoder_loads_from_safetensors_and_mapping(
    golden: Path, canvases: torch.Tensor, tmp_path: Path
) -> None:
    state = torch.load(golden / "model.pt", weights_only=True)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    config = json.loads((golden / "config.json").read_text())
    ours = load_rae_decoder(tmp_path / "model.safetensors", config)(canvases.half())
    assert torch.equal(ours, load_rae_decoder(golden / "model.pt", config)(canvases.half().float()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_hidden_size": 64}, r"cls_token has shape \(1, 1, 48\), expected \(1, 1, 64\)"),
        ({"decoder_num_hidden_layers": 4}, r"layers\.3\.layernorm_before\.weight is missing.*and 13 more"),
        ({"decoder_num_hidden_layers": 2}, r"layers\.2\.attention\S*\.weight has no place in the network"),
        ({"image_size": 64}, r"pos_embed has shape \(1, 65, 48\), expected \(1, 257, 48\)"),
        ({"hidden_size": 768}, r"embed\.weight has shape \(48, 24\), expected \(48, 768\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(golden: Path, change: dict[str, int], message: str) -> None:
    config = json.loads((golden / "config.json").read_text()) | change
    with pytest.raises(MismatchError, match=message):
        load_rae_decoder(golden / "model.pt", config)


def test_unusable_files_are_named(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="patch_size: Field required"):
        load_rae_decoder(golden / "model.pt", {"hidden_size": 24})
    with pytest.raises(UsageError, match=r"nowhere\.json"):
        load_rae_decoder(golden / "model.pt", tmp_path / "nowhere.json")
    config = json.loads((golden / "config.json").read_text()) | {"hidden_act": "relu"}
    with pytest.raises(UsageError, match="hidden_act is 'relu'"):
        load_rae_decoder(golden / "model.pt", config)
    with pytest.raises(TrainerError, match=r"nowhere\.pt not found"):
        load_rae_decoder(tmp_path / "nowhere.pt", golden / "config.json")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(TrainerError, match="expected plain tensors"):
        load_rae_decoder(tmp_path / "junk.pt", golden / "config.json")


def test_canvases_of_another_shape_are_refused(golden: Path, canvases: torch.Tensor) -> None:
    decoder = load_rae_decoder(golden / "model.pt", golden / "config.json")
    with pytest.raises(MismatchError, match=r"\(2, 24, 8, 8\), the decoder expects .*\(8, 8, 24\)"):
        decoder(canvases.permute(0, 3, 1, 2))
    dct = decoder_from_spec(DctBasis.default().spec())
    assert dct is not None
    with pytest.raises(MismatchError, match=r"expects \[B, H, W, 48\]"):
        dct(canvases)


def test_the_dct_decoder_comes_from_its_description() -> None:
    basis = DctBasis.default()
    images = torch.full((2, 3, 32, 48), 0.25)
    images[:, 0] = 0.6
    decoder = decoder_from_spec(json.loads(json.dumps(basis.spec())))
    assert decoder is not None
    assert torch.allclose(decoder(basis(images).half()), images, atol=2e-3)
    assert decoder_from_spec(None) is None
    with pytest.raises(UsageError, match="decoder of the shards: not a description"):
        decoder_from_spec({"kind": "vae"})


def test_pixels_are_clamped_and_rounded() -> None:
    images = torch.tensor([-0.5, 0.0, 0.501, 1.0, 7.0]).reshape(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_uint8(images)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert to_uint8(images).dtype == torch.uint8


def diffusers_folder(golden: Path, folder: Path, **fields: object) -> Path:
    """The decoder of the vectors as diffusers stores an AutoencoderRAE: other names, no positions, an encoder too."""
    config = json.loads((golden / "config.json").read_text())
    state = torch.load(golden / "model.pt", weights_only=True)
    names = {
        "attention.attention.query": "attention.to_q",
        "attention.attention.key": "attention.to_k",
        "attention.attention.value": "attention.to_v",
        "attention.output.dense": "attention.to_out.0",
    }
    tensors = {"encoder.layernorm.weight": torch.ones(24), "_latents_mean": torch.ones(24)}
    tensors |= {"encoder_mean": torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)}
    tensors |= {"encoder_std": torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)}
    for name, tensor in state.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if name != "decoder_pos_embed":
            tensors[f"decoder.{name}"] = tensor
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    own = {name: value for name, value in config.items() if name.startswith("decoder_")}
    own |= {"_class_name": "AutoencoderRAE", "encoder_hidden_size": 24, "encoder_input_size": 112}
    own |= {"encoder_patch_size": 14, "patch_size": 4, "image_size": None, "num_channels": 3} | fields
    (folder / "config.json").write_text(json.dumps(own))
    return folder


def test_a_folder_of_diffusers_decodes_to_identical_pixels(
    golden: Path, canvases: torch.Tensor, tmp_path: Path
) -> None:
    expected = load_rae_decoder(golden / "model.pt", golden / "config.json")(canvases)
    folder = diffusers_folder(golden, tmp_path / "diffusers")
    for place in (folder, folder / "diffusion_pytorch_model.safetensors"):
        assert torch.equal(load_decoder(place)(canvases), expected)
    with pytest.raises(MismatchError, match=r"another encoder: width 24, expected 768"):
        load_decoder(folder, {"width": 768})
    with pytest.raises(UsageError, match="num_channels is 4, expected 3"):
        load_decoder(diffusers_folder(golden, tmp_path / "four", num_channels=4))
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(
        TrainerError, match=r"no RAE decoder; the folder holds config\.json, expected .*nyu-visionx/RAE-coll"
    ):
        load_decoder(folder)


@pytest.mark.parametrize(
    "wrapper",
    [
        "model",
        "state_dict",
        "ema",
        "module.",
        "decoder.",
        "module.decoder.",
        "_orig_mod.",
        "rae.decoder.",
        "",
    ],
)
def test_wrapped_and_prefixed_state_dicts_are_read_with_the_config_of_rae(
    golden: Path, canvases: torch.Tensor, tmp_path: Path, wrapper: str
) -> None:
    state = torch.load(golden / "model.pt", weights_only=True)
    prefixed = {f"{wrapper}{name}": tensor for name, tensor in state.items()}
    is_prefix = wrapper.endswith(".") or not wrapper
    torch.save(prefixed if is_prefix else {wrapper: state, "epoch": 3}, tmp_path / "model.pt")
    config = json.loads((golden / "config.json").read_text())
    config |= {
        "patch_size": "SHOULD BE RELOADED",
        "hidden_size": 3072,
        "image_size": 224,
    }  # as in RAE's own file
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = load_rae_decoder(golden / "model.pt", golden / "config.json")(canvases)
    assert torch.equal(load_decoder(tmp_path)(canvases), expected)


def test_weights_without_config_are_recognised_by_their_shapes(golden: Path, tmp_path: Path) -> None:
    made = RaeDecoder(RaeDecoderConfig.of_size("tiny", channels=8, grid=2, patch_size=2))
    torch.save(rae_state(made.state_dict()), tmp_path / "model.pt")
    assert load_decoder(tmp_path / "model.pt").config == made.config
    with pytest.raises(UsageError, match=r"3 blocks of width 48, and no config\.json .* XL 28 × 1152\. Put"):
        load_rae_decoder(golden / "model.pt")
    torch.save({"epoch": torch.zeros(1), "conv.weight": torch.zeros(1, 1)}, tmp_path / "model.pt")
    with pytest.raises(
        MismatchError, match=r"decoder_embed\.weight is missing, and there are 2 other entries"
    ):
        load_decoder(tmp_path)
