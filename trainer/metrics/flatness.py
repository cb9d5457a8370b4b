"""Is level 0 piecewise constant? It has two regions, so the tokens of a perfect canvas take two values.

B images, N = H·W tokens, C channels
"""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 10
"""Lloyd iterations; on canvases and features of photographs, assignments converge within 10."""


def explained_share(within: Tensor, total: Tensor) -> Tensor:
    """Share of each image's token variance that its two regions explain: 1 − within/total, float32 [B] in [0, 1].

    within, total: what `two_region_variance` returns. A constant canvas has share 1.
    """
    return torch.where(total > 0, 1 - within / total.clamp(min=1e-30), 1.0).clamp(0.0, 1.0)


def two_region_variance(canvas: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared distance of tokens to the mean of their region, and to the mean of the image, by 2-means.

    canvas: [B, H, W, C]. Returns (within, total), float32 [B].
    2-means starts from the sign of the first principal component, so that the result is deterministic.
    """
    tokens_BNC = canvas.flatten(1, 2).double()
    tokens_BNC = tokens_BNC - tokens_BNC.mean(dim=1, keepdim=True)
    total = tokens_BNC.square().sum(dim=2).mean(dim=1)
    gram_BNN = tokens_BNC @ tokens_BNC.transpose(1, 2)
    is_first_BN = torch.linalg.eigh(gram_BNN).eigenvectors[..., -1] > 0
    for _ in range(ITERATIONS):
        distance_BN2 = torch.cdist(tokens_BNC, _means(tokens_BNC, is_first_BN))
        is_first_BN = distance_BN2[..., 0] < distance_BN2[..., 1]
    share_B2 = torch.stack([is_first_BN, ~is_first_BN], dim=1).double().mean(dim=2)
    between = (share_B2 * _means(tokens_BNC, is_first_BN).square().sum(dim=2)).sum(dim=1)
    return (total - between).clamp(min=0).float(), total.float()


def _means(tokens_BNC: Tensor, is_first_BN: Tensor) -> Tensor:
    weight_B2N = torch.stack([is_first_BN, ~is_first_BN], dim=1).to(tokens_BNC.dtype)
    return weight_B2N @ tokens_BNC / weight_B2N.sum(dim=2, keepdim=True).clamp(min=1)
