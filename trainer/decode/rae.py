"""Canvases → pixels: the RAE ViT decoder with the authors' weights, and the inverse of the `dct` encoder.

B canvases, H×W grid of tokens, C channels of the encoder, D width, N = 1 + H·W tokens, P pixels per patch
canvases [B, H, W, C] → pictures [B, 3, H·P, W·P], RGB, 0 black and 1 white
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hierarchy_builder.canvases.dct import DctBasis
from hierarchy_builder.errors import MismatchError, TrainerError, UsageError
from hierarchy_builder.fields import MOST_BLOCKS, MOST_ROWS, brief, named, require, require_size
from trainer.decode.rae_files import POSITIONS, PUBLISHED, SIZES, decoder_fields, release_tensors
from trainer.networks.layers import grid_positions
from trainer.training import checkpoint as saved
from trainer.training.config import checked
from trainer.training.release_files import check_weights, read_fields, read_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

RUN_DECODER = "decoder"
"""Folder of a run that may hold a decoder for it: config.json and the weights."""
WEIGHTS = (
    "model.safetensors",
    "model.pt",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
)
CONFIG = "config.json"

RELEASE_NAMES = {
    "embed": "decoder_embed",
    "class_token": "trainable_cls_token",
    "positions": "decoder_pos_embed",
    "norm": "decoder_norm",
    "predict": "decoder_pred",
}
"""Names of `RaeDecoder` → names in the release's checkpoint."""
RELEASE_BLOCK_NAMES = {
    "norm1": "layernorm_before",
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "out": "attention.output.dense",
    "norm2": "layernorm_after",
    "expand": "intermediate.dense",
    "contract": "output.dense",
}
"""The same inside a block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RaeDecoderConfig:
    """Shape of a decoder, with the field names of its config.json, whose other keys are ignored."""

    __repr__ = brief

    hidden_size: int
    """C, channels of the encoder."""
    patch_size: int
    """P, pixels per side of a patch."""
    image_size: int
    """Pixels per side of the decoded picture."""
    decoder_hidden_size: int
    """D, width of the transformer."""
    decoder_intermediate_size: int
    """Hidden width of the MLP."""
    decoder_num_attention_heads: int
    """Attention heads."""
    decoder_num_hidden_layers: int
    """Blocks."""
    layer_norm_eps: float = 1e-12
    """Epsilon of every LayerNorm."""
    qkv_bias: bool = True
    """Whether query, key and value have biases."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "patch_size", "image_size"):
            require_size(name, getattr(self, name))
        for name in ("hidden_size", "intermediate_size", "num_attention_heads"):
            require_size(f"decoder_{name}", getattr(self, f"decoder_{name}"))
        require_size("decoder_num_hidden_layers", self.decoder_num_hidden_layers, MOST_BLOCKS)
        require(
            self.image_size % self.patch_size == 0,
            f"image_size {self.image_size}, expected a multiple of patch_size {self.patch_size}",
        )
        require_size("image_size / patch_size", self.grid, MOST_ROWS)
        require(
            self.decoder_hidden_size % self.decoder_num_attention_heads == 0,
            f"decoder_hidden_size {self.decoder_hidden_size}, expected a multiple of "
            f"{self.decoder_num_attention_heads} heads",
        )
        require(
            0 <= self.layer_norm_eps < 1, f"layer_norm_eps is {self.layer_norm_eps}, expected 0 up to below 1"
        )

    @classmethod
    def of_size(cls, size: str, channels: int, grid: int, patch_size: int) -> RaeDecoderConfig:
        """The decoder called `size` for `channels` × `grid`² tokens. Raises UsageError naming the sizes."""
        depth, width, heads, hidden = named(SIZES, size, "decoder size")
        return cls(
            hidden_size=channels,
            patch_size=patch_size,
            image_size=grid * patch_size,
            decoder_hidden_size=width,
            decoder_intermediate_size=hidden,
            decoder_num_attention_heads=heads,
            decoder_num_hidden_layers=depth,
        )

    @property
    def grid(self) -> int:
        """Tokens per side."""
        return self.image_size // self.patch_size


class DecoderBlock(nn.Module):
    """Pre-LayerNorm attention and MLP (exact GELU)."""

    def __init__(self, config: RaeDecoderConfig) -> None:
        super().__init__()
        width, hidden = config.decoder_hidden_size, config.decoder_intermediate_size
        self.num_heads = config.decoder_num_attention_heads
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.query = nn.Linear(width, width, bias=config.qkv_bias)
        self.key = nn.Linear(width, width, bias=config.qkv_bias)
        self.value = nn.Linear(width, width, bias=config.qkv_bias)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        h = self.norm1(x_BND)
        q, k, v = (
            layer(h).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x_BND = x_BND + self.out(attended)
        return x_BND + self.contract(F.gelu(self.expand(self.norm2(x_BND))))


class RaeDecoder(nn.Module):
    """The ViT decoder of RAE (Zheng et al. 2025, "Diffusion Transformers with Representation Autoencoders").

    A new decoder is initialised for training: weights N(0, 0.02²) from torch's global generator, biases 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: RaeDecoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.decoder_hidden_size
        self.embed = nn.Linear(config.hidden_size, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(_positions(config), requires_grad=False)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder_num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.predict = nn.Linear(width, config.patch_size**2 * 3)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def logits(self, z: Tensor) -> Tensor:
        """Canvases [B, H, W, C] → normalised patches [B, H·W, P·P·3], each in rows, columns, channels."""
        expected = (self.config.grid, self.config.grid, self.config.hidden_size)
        if z.ndim != 4 or tuple(z.shape[1:]) != expected:
            raise MismatchError(
                f"canvases are {tuple(z.shape)}, the decoder expects [B, H, W, C] of {expected}"
            )
        tokens = self.embed(z.flatten(1, 2).to(self.embed.weight))  # on its device, in its dtype
        x_BND = torch.cat([self.class_token.expand(len(z), -1, -1), tokens], dim=1) + self.positions
        for block in self.blocks:
            x_BND = block(x_BND)
        return self.predict(self.norm(x_BND))[:, 1:]

    def forward(self, z: Tensor) -> Tensor:
        """Canvases [B, H, W, C] → RGB [B, 3, H·P, W·P], de-normalised and not clamped."""
        grid, patch = self.config.grid, self.config.patch_size
        patches = self.logits(z).unflatten(1, (grid, grid)).unflatten(-1, (patch, patch, 3))
        image = patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return image * self.std + self.mean


class ConditionalDecoder(ABC):
    """A decoder whose pictures depend on class and seed, and on all levels of a trajectory together."""

    @abstractmethod
    def of(self, label: int, seed: int) -> ConditionalDecoder:
        """The decoder of a trajectory of this class and seed."""

    @abstractmethod
    def __call__(self, canvases: Tensor) -> Tensor:
        """Levels [L, H, W, C] of a trajectory → RGB [L, 3, h, w] in [0, 1]."""

    def to(self, device: str | torch.device) -> Self:
        """Move the networks of the decoder, as that of a module does; subclasses that have any do so."""
        return self

    def draws(self, canvases: Tensor) -> bool:
        """Whether the decoder can draw pictures of these levels."""
        return True

    def at(self, canvases: Tensor, level: int) -> Tensor:
        """The picture of one level, RGB [3, h, w]; subclasses may draw it without the others."""
        return self(canvases)[level]


class DctDecoder(nn.Module):
    """Inverts the `dct` encoder: features → pixels."""

    def __init__(self, basis: DctBasis) -> None:
        super().__init__()
        self.basis = basis

    def forward(self, z: Tensor) -> Tensor:
        """Canvases [B, H, W, C] → RGB [B, 3, H·P, W·P] in [0, 1]."""
        if z.ndim != 4 or z.shape[-1] != self.basis.width:
            raise MismatchError(
                f"canvases are {tuple(z.shape)}, the decoder expects [B, H, W, {self.basis.width}]"
            )
        return self.basis.inverse(z.to(self.basis.offset))


def load_rae_decoder(weights: str | Path, config: Mapping[str, Any] | str | Path | None = None) -> RaeDecoder:
    """Load RAE's decoder, frozen and in evaluation mode, from any layout that `trainer/decode/rae_files.py` lists.

    weights: a file of tensors, .pt, .bin or .safetensors. config: its config.json, as a mapping or a file; None takes
    the sizes from the shapes of the weights.
    Raises UsageError for an incomplete config, MismatchError if the weights do not fit the config.
    """
    given = config if isinstance(config, Mapping) else read_fields(Path(config)) if config else None
    where = f"decoder config {config}" if isinstance(config, str | Path) else "decoder config"
    tensors = release_tensors(read_weights(Path(weights)), weights)
    values = decoder_fields(given, tensors, where if given is not None else weights)
    if values.get("hidden_act", "gelu") != "gelu":
        raise UsageError(f"{where}: hidden_act is {values['hidden_act']!r}, expected 'gelu'")
    known = {field.name for field in dataclasses.fields(RaeDecoderConfig)}
    try:
        shape = checked(RaeDecoderConfig, {name: values[name] for name in known & values.keys()}, where)
    except UsageError as error:
        raise UsageError(f"{error}; {PUBLISHED}") from None
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in RaeDecoder(shape).state_dict().items()}
    picture = [tensors.pop(f"encoder_{name}", None) for name in ("mean", "std")]
    if POSITIONS not in tensors:  # fixed, and so not stored by diffusers
        tensors[POSITIONS] = _positions(shape)
    check_weights(
        weights,
        tensors,
        {_release_name(name): expected for name, expected in shapes.items()},
        advice=PUBLISHED,
    )
    decoder = RaeDecoder(shape)
    decoder.load_state_dict({name: tensors[_release_name(name)] for name in shapes})
    for own, stored in zip((decoder.mean, decoder.std), picture, strict=True):
        if isinstance(stored, Tensor) and stored.numel() == own.numel():
            own.copy_(stored.reshape(own.shape))
    return decoder.eval().requires_grad_(False)


def _positions(config: RaeDecoderConfig) -> Tensor:
    """Fixed positions [1, N, D] of the class token, 0, and of the grid."""
    return F.pad(grid_positions(config.grid, config.grid, config.decoder_hidden_size), (0, 0, 1, 0))[None]


def rae_state(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a `RaeDecoder` under the release's names."""
    return {_release_name(name): tensor.detach().contiguous().cpu() for name, tensor in weights.items()}


def load_decoder(path: Path, encoder: Mapping[str, Any] | None = None) -> RaeDecoder:
    """The RAE decoder of a file of weights, or of a folder that holds one, with the config.json beside it if any.

    encoder: description of the encoder whose features will be decoded; decoders trained by this project store theirs.
    Raises TrainerError if a file is missing, MismatchError if the decoder was trained for another encoder.
    """
    folder = path.parent if path.is_file() else path
    weights = [path] if path.is_file() else _weights_in(path)
    if not weights:
        there = sorted(file.name for file in folder.iterdir())[:5] if folder.is_dir() else []
        raise TrainerError(
            f"{folder}: found no RAE decoder; the folder holds {', '.join(there) or 'nothing'}, expected one of "
            f"{', '.join(WEIGHTS)} and its {CONFIG}; {PUBLISHED}"
        )
    config = folder / CONFIG if (folder / CONFIG).exists() else None
    decoder = load_rae_decoder(weights[0], config)
    own = (read_fields(config).get("encoder") if config else None) or {}
    if not isinstance(own, dict):
        raise UsageError(f"{folder / CONFIG}: encoder is {own!r}, expected its description")
    if encoder:
        own = {"width": decoder.config.hidden_size, "grid": [decoder.config.grid] * 2} | own
        differing = [
            f"{name} {own[name]!r}, expected {encoder[name]!r}"
            for name in ("name", "weights_hash", "width", "grid")
            if name in own and name in encoder and own[name] != encoder[name]
        ]
        if differing:
            raise MismatchError(
                f"{path} decodes features of another encoder: {'; '.join(differing)}: "
                "train one with `trainer train-decoder`"
            )
    return decoder


def _weights_in(folder: Path) -> list[Path]:
    return [folder / name for name in WEIGHTS if (folder / name).exists()]


def find_decoder(run: Path, encoder: Mapping[str, Any]) -> RaeDecoder | DctDecoder | None:
    """The decoder in the folder `decoder` of a run, else the one its encoder declares, else None."""
    folder = run / RUN_DECODER
    if (folder / CONFIG).exists() or _weights_in(folder):
        return load_decoder(folder, encoder)
    return decoder_from_spec(encoder.get("decoder"))


def decoder_from_spec(spec: Mapping[str, Any] | None) -> DctDecoder | None:
    """The decoder that an encoder declares in the index of its shards, or None if it declares none.

    Raises UsageError for an invalid description.
    """
    if spec is None:
        return None
    try:
        return DctDecoder(DctBasis.from_spec(dict(spec))).eval()
    except ValueError as error:
        raise UsageError(f"decoder of the shards: {error}") from None


def to_uint8(images: Tensor) -> Tensor:
    """RGB [B, 3, h, w], clamped to [0, 1] → uint8 [B, h, w, 3]."""
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def _release_name(name: str) -> str:
    """The name in the release's checkpoint of a tensor of `RaeDecoder`."""
    head, dot, rest = name.partition(".")
    if head == "blocks":
        number, layer, kind = rest.split(".")
        return f"decoder_layers.{number}.{RELEASE_BLOCK_NAMES[layer]}.{kind}"
    return RELEASE_NAMES[head] + dot + rest


def decoder_for(
    path: Path,
    encoder: dict[str, Any],
    decoder: Callable[[Tensor], Tensor] | str | Path | None,
    device: str | torch.device,
) -> Callable[[Tensor], Tensor] | None:
    """The given decoder, loaded if it is a folder; by default that of the run at `path`, or else the encoder's own."""
    if decoder is not None and not isinstance(decoder, str | Path):
        return decoder
    found = (
        find_decoder(saved.run_of(path), encoder) if decoder is None else load_decoder(Path(decoder), encoder)
    )
    return found.to(device) if isinstance(found, RaeDecoder) else found
