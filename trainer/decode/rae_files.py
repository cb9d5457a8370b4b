"""Published files of RAE decoders: which layout a file has, and the sizes and tensors that `RaeDecoder` needs.

Three layouts are understood: a plain state dict of the RAE release (with or without its config.json), the folder of
diffusers' `AutoencoderRAE`, and what `trainer train-decoder` writes. Each may also be wrapped, such as {"model": …} or
{"state_dict": …}, and its names may begin with anything, such as "module." or "_orig_mod.decoder.".
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hierarchy_builder.errors import MismatchError, UsageError

DIFFUSERS_ATTENTION = {
    "to_q": "attention.query",
    "to_k": "attention.key",
    "to_v": "attention.value",
    "to_out.0": "output.dense",
}
"""Projections of an attention in diffusers → in the release of RAE."""
SIZES = {
    "tiny": (4, 192, 3, 768),
    "B": (12, 768, 12, 3072),
    "L": (24, 1024, 16, 4096),
    "XL": (28, 1152, 16, 4096),
}
"""Blocks, width, heads and hidden width of the MLP; B, L and XL are the release's."""
PUBLISHED = (
    "published decoders: https://huggingface.co/nyu-visionx/RAE-collections "
    "(decoders/dinov2/wReg_base/ViTXL_n08/model.pt) and, for diffusers, the repositories "
    "https://huggingface.co/nyu-visionx/RAE-…, such as RAE-dinov2-wReg-base-ViTXL-n08"
)
EMBED, PREDICT, POSITIONS = "decoder_embed.weight", "decoder_pred.weight", "decoder_pos_embed"


def release_tensors(content: Mapping[str, Any], where: object) -> dict[str, Any]:
    """The tensors of a decoder under the release's names, from any of the layouts.

    Other parts of a whole autoencoder, such as its encoder, are left out; its `encoder_mean` and `encoder_std` stay.
    Raises MismatchError if there is no decoder.
    """
    if (found := _decoder_in(content)) is None:
        names = ", ".join(sorted(map(str, content))[:3]) or "nothing"
        raise MismatchError(
            f"{where}: found no decoder of RAE: {EMBED} is missing, and there are {len(content)} other entries "
            f"({names}, …); {PUBLISHED}"
        )
    tensors, prefix = found
    outer = prefix.removesuffix("decoder.")
    named = {name: value for name, value in tensors.items() if isinstance(name, str)}
    own = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
    own |= {
        name: tensors[outer + name] for name in ("encoder_mean", "encoder_std") if outer + name in tensors
    }
    return {_release_name(name): value for name, value in own.items()}


def _decoder_in(content: Mapping[Any, Any], depth: int = 3) -> tuple[Mapping[str, Any], str] | None:
    """The mapping that holds a decoder, at most `depth` inside another, and what its names begin with."""
    for name in content:
        if isinstance(name, str) and (name == EMBED or name.endswith(f".{EMBED}")):
            return content, name.removesuffix(EMBED)
    inner = [each for each in content.values() if isinstance(each, Mapping)] if depth else []
    return next((found for each in inner if (found := _decoder_in(each, depth - 1)) is not None), None)


def _release_name(name: str) -> str:
    found = re.fullmatch(r"(decoder_layers\.\d+\.attention)\.(to_q|to_k|to_v|to_out\.0)\.(\w+)", name)
    return f"{found[1]}.{DIFFUSERS_ATTENTION[found[2]]}.{found[3]}" if found else name


def decoder_fields(
    given: Mapping[str, Any] | None, tensors: Mapping[str, Any], where: object
) -> dict[str, Any]:
    """The fields of `RaeDecoderConfig`, from a configuration of any layout or, where it is silent, from the weights.

    given: the fields of config.json, or None if there is none. Raises UsageError or MismatchError, which say what is
    missing and where files are published, if neither tells the sizes.
    """
    if given is None:
        return _sizes_of(tensors, where) | _transformer_of(tensors, where)
    kind = given.get("_class_name", "AutoencoderRAE")
    if kind != "AutoencoderRAE":
        raise UsageError(f"{where}: found {kind}, expected AutoencoderRAE; {PUBLISHED}")
    if "_class_name" in given or "encoder_hidden_size" in given:
        return _of_diffusers(given, where)
    if "patch_size" in given and type(given["patch_size"]) is str:  # RAE's own file leaves it to its scripts
        return {**given, **_sizes_of(tensors, f"weights beside {where}")}
    return dict(given)


def _of_diffusers(given: Mapping[str, Any], where: object) -> dict[str, Any]:
    wanted = ("encoder_hidden_size", "patch_size")
    if lacking := [name for name in wanted if name not in given]:
        raise UsageError(
            f"{where}: an AutoencoderRAE without {', '.join(lacking)}; copy its config.json again. {PUBLISHED}"
        )
    if given.get("num_channels", 3) != 3:
        raise UsageError(f"{where}: num_channels is {given['num_channels']}, expected 3, RGB")
    fields = {**given, "hidden_size": given["encoder_hidden_size"]}
    if given.get("image_size") is None:
        sizes = [given.get(name) for name in ("patch_size", "encoder_input_size", "encoder_patch_size")]
        if not all(type(size) is int and size > 0 for size in sizes):
            raise UsageError(
                f"{where}: image_size is absent, and so patch_size, encoder_input_size and encoder_patch_size must "
                f"be positive integers; found {sizes}"
            )
        fields["image_size"] = sizes[0] * (sizes[1] // sizes[2])  # type: ignore[operator]
    return fields


def _sizes_of(tensors: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Channels, patch and picture size, from the shapes of the first and last layer and of the positions."""
    embed, predict, positions = (_shape(tensors, name, where) for name in (EMBED, PREDICT, POSITIONS))
    patch = math.isqrt(predict[0] // 3)
    grid = math.isqrt(max(positions[1] - 1, 0)) if len(positions) == 3 else 0
    if len(embed) != 2 or patch * patch * 3 != predict[0] or grid * grid + 1 != positions[-2]:
        raise MismatchError(
            f"{where}: {EMBED} {embed}, {PREDICT} {predict} and {POSITIONS} {positions} are of no decoder of square "
            f"patches on a square grid; {PUBLISHED}"
        )
    return {"hidden_size": embed[1], "patch_size": patch, "image_size": patch * grid}


def _transformer_of(tensors: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Sizes of the transformer; the number of heads is in no shape, so the size must be one of the release's."""
    width = _shape(tensors, EMBED, where)[0]
    layers = [re.match(r"decoder_layers\.(\d+)\.", name) for name in tensors]
    depth = 1 + max((int(found[1]) for found in layers if found), default=-1)
    known = {(blocks, width): (heads, hidden) for blocks, width, heads, hidden in SIZES.values()}
    if (depth, width) not in known:
        sizes = ", ".join(f"{name} {blocks} × {wide}" for name, (blocks, wide, *_) in SIZES.items())
        raise UsageError(
            f"{where}: found a decoder of {depth} blocks of width {width}, and no config.json that tells its heads; "
            f"without one, these sizes are known: {sizes}. Put its config.json beside it. {PUBLISHED}"
        )
    heads, hidden = known[depth, width]
    return {
        "decoder_hidden_size": width,
        "decoder_intermediate_size": hidden,
        "decoder_num_attention_heads": heads,
        "decoder_num_hidden_layers": depth,
    }


def _shape(tensors: Mapping[str, Any], name: str, where: object) -> tuple[int, ...]:
    tensor = tensors.get(name)
    if not isinstance(tensor, Tensor) or tensor.ndim < 2:
        raise MismatchError(f"{where}: {name} is missing or no array, expected a decoder of RAE; {PUBLISHED}")
    return tuple(tensor.shape)
