"""DINOv2 and all other vision transformers of timm: patch tokens after a final LayerNorm without weight and bias.

Trajectory Forcing uses `dinov2-reg-base` in this way: the final LayerNorm keeps its epsilon but has no weight and bias,
so that each token has mean 0 and variance 1; class and register tokens are dropped. Every timm ViT is treated alike,
including those whose final norm comes after the pooling.

`dinov2-original-SIZE` resizes the position embedding of 37×37 tokens as the authors' code does for models without
registers: bicubically to a scale of 16.1/37, without antialiasing. timm antialiases, as that code does with registers.

`NAME@K` gives the tokens after the first K blocks, with the same LayerNorm; the blocks after them are not run.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub as hub
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hierarchy_builder.errors import BuilderError, UsageError
from hierarchy_builder.fields import nearest
from hierarchy_builder.files.whole import sha256_file
from hierarchy_builder.machine.transfers import begin_fetch, sent
from hierarchy_builder.machine.vision_libraries import import_vision, timm_model

timm = import_vision("timm")

DINOV2_SIZE_PX, DINOV2_PATCH_PX = 224, 14
"""Input size of DINOv2 and side of its patches; timm resamples its position embedding from 518 px."""
ORIGINAL = "dinov2-original-"
ORIGINAL_OFFSET = 0.1
"""The authors' code adds it to the number of tokens a side before it computes the scale of the resampling."""
HUB_TIMEOUT_S = 10


class TimmEncoder:
    """A timm vision transformer as an encoder.

    model: any timm model with `patch_embed`, `num_prefix_tokens` and `forward_features` → [B, prefix + N, C].
    num_blocks: blocks that are kept, from the first on; None keeps all.
    Images are resized bicubically without timm's crop_pct and normalised with the mean and std of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        weights_hash: str,
        num_blocks: int | None = None,
        precision: str = "float32",
        device: str | torch.device = "cpu",
    ) -> None:
        patches: Any = getattr(model, "patch_embed", None)
        if not hasattr(model, "num_prefix_tokens") or not hasattr(patches, "grid_size"):
            raise UsageError(
                f"encoder {name}: {type(model).__name__} has no patch tokens, expected a vision transformer"
            )
        self.name = name
        self.weights_hash = weights_hash
        self.grid: tuple[int, int] = tuple(patches.grid_size)
        self.image_size_px: int = patches.img_size[0]
        self.width: int = int(model.num_features)  # type: ignore[arg-type]
        self.bfloat16 = precision == "bfloat16"
        self.device = torch.device(device)
        self.num_blocks = num_blocks
        if num_blocks is not None:
            _keep_blocks(model, num_blocks, name)
        self.epsilon = _final_epsilon(model)
        model.norm = nn.Identity()
        self.model: Any = model.eval().requires_grad_(False).to(self.device)
        config = getattr(model, "pretrained_cfg", None) or {}
        self.mean = tuple(config.get("mean") or (0.485, 0.456, 0.406))
        self.std = tuple(config.get("std") or (0.229, 0.224, 0.225))
        self._shift, self._scale = torch.tensor([self.mean, self.std], device=self.device)[..., None, None]

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> np.ndarray:
        """RGB uint8 [B, S, S, 3] → float32 [B, H, W, C], every token with mean 0 and variance 1."""
        return self._on_device(images).cpu().numpy()

    @torch.inference_mode()
    def begin_half(self, images: np.ndarray) -> Callable[[], np.ndarray]:
        """Begin to encode float16 as a build stores it; see `encoders.encode`. A GPU converts and checks it.

        Nothing here waits for the GPU, so that it has the next batch when it ends this one.
        """
        tokens = self._on_device(images).half()
        is_finite = tokens.isfinite().flatten(1).all(dim=1)
        there, arrival = begin_fetch(tokens.masked_fill_(~is_finite[:, None, None, None], torch.nan))

        def arrived() -> np.ndarray:
            if arrival is not None:
                arrival.synchronize()
            return there.numpy()

        return arrived

    def _on_device(self, images: np.ndarray) -> Tensor:
        return self.tokens(sent(torch.from_numpy(images), self.device).permute(0, 3, 1, 2).float() / 255)

    def tokens(self, pixels: Tensor) -> Tensor:
        """RGB [B, 3, S, S] in [0, 1] → what `encode` returns, with its gradient."""
        pixels = (pixels - self._shift) / self._scale
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            tokens = self.model.forward_features(pixels)
        tokens = tokens[:, self.model.num_prefix_tokens :].float()
        tokens = F.layer_norm(tokens, (self.width,), eps=self.epsilon)
        return tokens.reshape(-1, *self.grid, self.width)

    def describe(self) -> dict[str, Any]:
        """JSON for the manifest; `decoder` is None, since decoding these tokens needs a trained decoder."""
        return {
            "name": self.name,
            "image_size_px": self.image_size_px,
            "grid": list(self.grid),
            "width": self.width,
            # Without this key all blocks are kept, as in builds of releases that always kept them.
            **({} if self.num_blocks is None else {"output": f"block {self.num_blocks}"}),
            **({"positions": "original"} if self.name.startswith(ORIGINAL) else {}),
            "normalisation": {"mean": list(self.mean), "std": list(self.std)},
            "weights_hash": self.weights_hash,
            "decoder": None,
        }


def load_timm(name: str, *, weights: str | None, precision: str, device: torch.device) -> TimmEncoder:
    """Build the model for `dinov2-…` or `timm:NAME` with weights from a file, the hub cache or the hub.

    weights: .safetensors or .pth of plain tensors, named as in timm or by the original authors; `random:SEED`; or None
    for the hub. They are those of all blocks, also for `NAME@K`. The weights hash is that of the file, or of the
    tensors if they are random.
    """
    whole, num_blocks = _split_blocks(name)
    model_name, arguments = _timm_name(whole)
    if model_name.partition(".")[0] not in timm.list_models():
        hint = nearest(model_name, timm.list_models("*vit*"))
        raise UsageError(f"encoder {name}: timm has no model {model_name!r}, {hint}")
    if num_blocks is not None:  # refused before the weights, which may be a long download
        with torch.device("meta"):
            whole_model = timm.create_model(model_name, pretrained=False, num_classes=0, **arguments)
        _keep_blocks(whole_model, num_blocks, name)
    if weights is not None and weights.startswith("random:"):
        model = _random_model(name, model_name, weights.removeprefix("random:"), arguments)
        digest = _state_hash(model)
    else:
        path = Path(weights) if weights is not None else _hub_file(name, model_name)
        model = _model_with_weights(name, model_name, path, arguments)
        digest = sha256_file(path)
    return TimmEncoder(
        model, name=name, weights_hash=digest, num_blocks=num_blocks, precision=precision, device=device
    )


def _split_blocks(name: str) -> tuple[str, int | None]:
    """The name of the whole network, and K of `NAME@K`."""
    whole, at, blocks = name.partition("@")
    if not at:
        return whole, None
    if not (blocks.isascii() and blocks.isdigit()):
        raise UsageError(
            f"encoder {name}: {blocks!r} follows the @, expected a number of blocks, for example {whole}@9"
        )
    return whole, int(blocks)


def _keep_blocks(model: Any, num_blocks: int, name: str) -> None:
    """Remove all blocks after the first `num_blocks`; they then cost neither time nor memory."""
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList):
        raise UsageError(f"encoder {name}: {type(model).__name__} has no list of blocks; omit @{num_blocks}")
    if not 1 <= num_blocks <= len(blocks):
        raise UsageError(
            f"encoder {name}: @{num_blocks} asks for the first {num_blocks} blocks, and the network has "
            f"{len(blocks)}: expected @1 to @{len(blocks)}"
        )
    model.blocks = blocks[:num_blocks]


def _timm_name(name: str) -> tuple[str, dict[str, Any]]:
    if name.startswith("timm:"):
        return name.removeprefix("timm:"), {}
    size = name.rpartition("-")[2]
    registers = "_reg4" if name.startswith("dinov2-reg-") else ""
    return f"vit_{size}_patch14{registers}_dinov2", {"img_size": DINOV2_SIZE_PX}


def _final_epsilon(model: Any) -> float:
    """Epsilon of the last LayerNorm, before or (fc_norm) after the pooling."""
    norms = (getattr(model, name, None) for name in ("norm", "fc_norm"))
    return next((float(norm.eps) for norm in norms if norm is not None and hasattr(norm, "eps")), 1e-6)


def _random_model(name: str, model_name: str, seed: str, arguments: dict[str, Any]) -> nn.Module:
    if not seed.isdigit():
        raise UsageError(
            f"encoder {name}: weights are random:{seed}, expected random:SEED, for example random:0"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed))
        return timm.create_model(model_name, pretrained=False, num_classes=0, **arguments)


def _model_with_weights(name: str, model_name: str, path: Path, arguments: dict[str, Any]) -> nn.Module:
    """Build a model with weights from `path`, which must hold every weight of the model."""
    if not path.is_file():
        raise UsageError(f"encoder {name}: weight file {path} not found; check --weights")

    def resize(state: dict[str, Tensor]) -> None:
        state["pos_embed"] = _resized_as_by_authors(state["pos_embed"])

    try:
        return timm_model(model_name, path, resize if name.startswith(ORIGINAL) else None, **arguments)
    except Exception as error:  # each file format raises its own exceptions
        reason = " ".join(str(error).partition(". ")[0].split())[:300]
        raise BuilderError(
            f"encoder {name}: {path} does not hold the weights of {model_name}; expected .safetensors "
            f"or a .pth of plain tensors: {reason}"
        ) from None


def _resized_as_by_authors(positions: Tensor) -> Tensor:
    """Position embedding [1, 1 + M², C] of DINOv2 at 518 px → [1, 1 + 256, C].

    Source: interpolate_pos_encoding of facebookresearch/dinov2, with its defaults for models without registers.
    """
    side, wanted = math.isqrt(positions.shape[1] - 1), DINOV2_SIZE_PX // DINOV2_PATCH_PX
    first, grid = positions.split([1, side**2], dim=1)
    scale = (wanted + ORIGINAL_OFFSET) / side
    grid = grid.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    return torch.cat([first, grid.flatten(2).mT.to(first)], dim=1)


def _hub_file(name: str, model_name: str) -> Path:
    """Return the weight file of a timm model from the local hub cache, or download it.

    A single request with a short timeout checks whether the hub is reachable, since huggingface_hub would retry for
    most of a minute.
    """
    config = timm.models.get_pretrained_cfg(model_name)
    if config is None or not config.hf_hub_id:
        raise BuilderError(f"encoder {name}: timm knows no weights on the hub, pass --weights FILE")
    file = {"repo_id": config.hf_hub_id, "filename": config.hf_hub_filename or "model.safetensors"}
    try:
        return Path(hub.hf_hub_download(**file, local_files_only=True))
    except Exception:  # not in the cache
        pass
    try:
        if not hub.constants.HF_HUB_OFFLINE:
            hub.get_hf_file_metadata(hub.hf_hub_url(**file), timeout=HUB_TIMEOUT_S)
            return Path(hub.hf_hub_download(**file))
        reason = "HF_HUB_OFFLINE is set"
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise BuilderError(
        f"encoder {name}: the weights are not in the local hub cache, and the hub did not provide them ({reason}): "
        f"download {file['filename']} of https://huggingface.co/{file['repo_id']} elsewhere and pass --weights FILE"
    )


def _state_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
