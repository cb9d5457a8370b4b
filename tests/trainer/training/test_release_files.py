"""Files of releases that are damaged, of another network or no such file at all: each is refused in a sentence."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from released import GOLDEN
from safetensors.torch import load_file, save_file

from hierarchy_builder.errors import MismatchError, TrainerError, UsageError
from trainer.decode.rae import load_decoder
from trainer.methods.latent_forcing.release import load_latent_forcing
from trainer.training.release_files import check_weights, read_fields, read_weights


@pytest.fixture
def latent() -> Path:
    return GOLDEN / "latent_forcing_tiny"


@pytest.fixture
def rae() -> Path:
    return GOLDEN / "rae_decoder_tiny"


def copied(folder: Path, to: Path, weights: dict[str, Any] | bytes | None = None, **fields: Any) -> Path:
    """A release folder with other weights, as safetensors or as they are, and other fields of its configuration."""
    to.mkdir(exist_ok=True)
    config = json.loads((folder / "config.json").read_text()) | fields
    (to / "config.json").write_text(json.dumps(config))
    file = next(folder / name for name in ("model.safetensors", "model.pt") if (folder / name).exists())
    if isinstance(weights, dict) and file.suffix == ".pt":
        torch.save(weights, to / file.name)
    elif isinstance(weights, dict):
        save_file(weights, to / file.name)
    else:
        (to / file.name).write_bytes(file.read_bytes() if weights is None else weights)
    return to


def test_a_configuration_is_fields_by_name(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for text, message in (
        ("{", "Expecting property name"),
        ("[1]", "found list, expected an object; expected fields by name"),
        ("[" * 100_000, "nested too deeply"),
        ("\0", "Expecting value"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=message) as raised:
            read_fields(file)
        assert str(file) in str(raised.value)
    with pytest.raises(UsageError, match="Is a directory"):
        read_fields(tmp_path)


@pytest.mark.filterwarnings("error")
def test_tensors_come_from_plain_files_only(rae: Path, tmp_path: Path) -> None:
    whole = (rae / "model.pt").read_bytes()
    file = tmp_path / "model.pt"
    for content in (b"", whole[:1000], whole[:-1], pickle.dumps(print)):
        file.write_bytes(content)
        with pytest.raises(
            TrainerError, match=r"model\.pt: expected plain tensors, .*: .+; copy the file again"
        ):
            read_weights(file)
    for unnamed in ([1], torch.zeros(3), {1: torch.zeros(2)}):
        torch.save(unnamed, file)
        with pytest.raises(TrainerError, match="not names of tensors"):
            read_weights(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": None}, "a is missing"),
        ({"a": 3}, "a is no plain tensor"),
        ({"a": torch.zeros(2, 3).to_sparse()}, "a is no plain tensor"),
        ({"a": torch.zeros(2, 3, device="meta")}, "a is no plain tensor"),
        ({"a": torch.zeros(3, 2)}, r"a has shape \(3, 2\), expected \(2, 3\)"),
        ({"a": torch.zeros(2, 3, dtype=torch.int32)}, "a is int32, expected floating-point numbers"),
        ({"a": torch.full((2, 3), torch.nan)}, "a holds NaN or infinite values"),
        ({"b": torch.tensor([1.0, torch.inf])}, "b holds NaN or infinite values"),
        ({"c": torch.zeros(1)}, "c has no place in the network"),
        (
            {"a": torch.zeros(1), "b": torch.zeros(3)},
            r"the file: b has shape \(3,\), expected \(2,\) \(3 rows\); a",
        ),
    ],
)
def test_weights_are_finite_and_of_their_shapes(changes: dict[str, Any], message: str) -> None:
    expected = {"a": (2, 3), "b": (2,)}
    given: dict[str, Any] = {"a": torch.zeros(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16)}
    check_weights("the file", given, expected)
    given = {name: value for name, value in (given | changes).items() if value is not None}
    with pytest.raises(
        MismatchError, match=message.replace("the file:", "the file does not fit the network:")
    ):
        check_weights("the file", given, expected, lambda name, shape: "3 rows" if name == "b" else "")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": None}, r"config\.json is no configuration of Latent Forcing: depth is None"),
        ({"input_size": float("inf")}, "input_size is inf; expected whole numbers"),
        (
            {"input_size": 33},
            "pictures of 33 pixels a side and 3 channels, expected a multiple of patch_size 4",
        ),
        ({"patch_size": 0}, "patch_px is 0, expected above 0"),
        ({"in_channels": 4}, "and 4 channels"),
        ({"input_size": 4 * 10**9}, "a side of the grid is 1000000000, expected above 0 and at most 1,024"),
        ({"depth": 10**30}, "depth is 1000000000000000000000000000000, expected above 0 and at most 1,000"),
        ({"num_classes": 10**30}, "num_classes is 1000000000000000000000000000000, .*at most 1,000,000"),
    ],
)
def test_configurations_of_latent_forcing_are_checked(
    latent: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load_latent_forcing(copied(latent, tmp_path, **fields))


def test_weights_of_latent_forcing_are_checked(latent: Path, tmp_path: Path) -> None:
    weights = load_file(latent / "model.safetensors")
    name = "blocks.0.attn.qkv.weight"
    for tensor, message in (
        (torch.zeros(()), r"qkv.weight has shape \(\), expected \(192, 64\)"),
        (weights[name].int(), "qkv.weight is int32, expected floating-point"),
        (weights[name] * torch.nan, "qkv.weight holds NaN"),
    ):
        with pytest.raises(MismatchError, match=message):
            load_latent_forcing(copied(latent, tmp_path, weights | {name: tensor}))
    moved = weights | {"pos_embed": weights["pos_embed"].flip(1)}
    with pytest.raises(MismatchError, match="pos_embed is not the fixed embedding of a grid of"):
        load_latent_forcing(copied(latent, tmp_path, moved))
    whole = (latent / "model.safetensors").read_bytes()
    for content in (whole[:7], whole[: len(whole) // 2], b"\xff" * 8 + whole[8:], whole + b"more"):
        with pytest.raises(TrainerError, match=r"model\.safetensors: expected plain tensors"):
            load_latent_forcing(copied(latent, tmp_path, content))
    with pytest.raises(UsageError, match="No such file"):
        load_latent_forcing(tmp_path / "absent")


def test_half_precision_and_no_positions_load_as_well(latent: Path, tmp_path: Path) -> None:
    """The positions are fixed, so a file may lack them; rounded ones are those of the grid still."""
    weights = {name: tensor.bfloat16() for name, tensor in load_file(latent / "model.safetensors").items()}
    rounded = load_latent_forcing(copied(latent, tmp_path, weights))
    del weights["pos_embed"]
    without = load_latent_forcing(copied(latent, tmp_path, weights))
    assert all(torch.equal(p, without.get_parameter(name)) for name, p in rounded.named_parameters())
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_norm_eps": "small"}, "layer_norm_eps: Input should be a valid number"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
        ({"qkv_bias": 7}, "qkv_bias: Input should be a valid boolean"),
        ({"image_size": 33}, "image_size 33, expected a multiple of patch_size 4"),
        ({"image_size": 4 * 10**30}, "at most 1,000,000"),
        ({"decoder_num_attention_heads": 5}, "decoder_hidden_size 48, expected a multiple of 5 heads"),
        ({"decoder_num_hidden_layers": 10**30}, "decoder_num_hidden_layers is .*at most 1,000"),
        ({"patch_size": 0}, "patch_size is 0, expected above 0"),
        ({"encoder": 5}, "encoder is 5, expected its description"),
    ],
)
def test_configurations_of_decoders_are_checked(
    rae: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load_decoder(copied(rae, tmp_path, **fields))


def test_weights_of_decoders_are_checked(rae: Path, tmp_path: Path) -> None:
    weights = torch.load(rae / "model.pt", weights_only=True)
    for change, message in (
        ({"decoder_embed.weight": 3}, "decoder_embed.weight is no plain tensor"),
        ({"decoder_embed.bias": weights["decoder_embed.bias"] / 0}, "decoder_embed.bias holds NaN"),
        ({"epoch": 4}, "epoch has no place in the network"),
    ):
        with pytest.raises(MismatchError, match=message):
            load_decoder(copied(rae, tmp_path, weights | change))


def test_a_decoder_of_other_tokens_is_refused_before_it_draws(rae: Path) -> None:
    """The release's decoder does not say whose features it decodes, but how wide they are and how many."""
    load_decoder(rae, {"name": "any", "grid": [8, 8], "width": 24})
    with pytest.raises(MismatchError, match=r"width 24, expected 16; grid \[8, 8\], expected \[6, 6\]"):
        load_decoder(rae, {"name": "any", "grid": [6, 6], "width": 16})
