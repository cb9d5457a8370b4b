"""An encoder without weights: low DCT frequencies of Oklab patches, 256 px → 16×16×48.

Its features are poorer than those of a trained network, but they are exact, need no download and decode to pixels, so
every stage from images to samples can run on it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hierarchy_builder.canvases.dct import DctBasis


class DctEncoder:
    """Encoder with the channels of `DctBasis.default()`; it always computes in float32."""

    name = "dct"
    image_size_px = 256

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.basis = DctBasis.default().to(device)
        self.device = torch.device(device)
        self.width = self.basis.width
        side = self.image_size_px // self.basis.patch_px
        self.grid = (side, side)
        self.weights_hash = hashlib.sha256(json.dumps(self.basis.spec()).encode()).hexdigest()

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> np.ndarray:
        """RGB uint8 [B, S, S, 3] → float32 [B, H, W, C]."""
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float() / 255
        return self.tokens(pixels).contiguous().cpu().numpy()

    def tokens(self, pixels: Tensor) -> Tensor:
        """RGB [B, 3, S, S] in [0, 1] → float32 [B, H, W, C], with its gradient."""
        return self.basis(pixels)

    def describe(self) -> dict[str, Any]:
        """JSON for the manifest; `decoder` holds every number needed to turn features into pixels."""
        return {
            "name": self.name,
            "image_size_px": self.image_size_px,
            "grid": list(self.grid),
            "width": self.width,
            "normalisation": "sRGB to Oklab",
            "weights_hash": self.weights_hash,
            "decoder": self.basis.spec(),
        }
