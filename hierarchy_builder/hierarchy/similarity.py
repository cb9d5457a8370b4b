"""Cosine similarities between the tokens of each image, the only quantity that a hierarchy computes from channels.

The products are computed in float32, and again in float64 for images with hardly any contrast. Even so they take half
of the time of a hierarchy on a CPU.

    N images, H×W grid, T = H·W tokens, C channels
"""

from __future__ import annotations

import contextlib
import functools

import numba
import numpy as np
import torch
from threadpoolctl import ThreadpoolController

from hierarchy_builder.machine.transfers import as_tensor

SINGLE_PRECISION_SPREAD = 1e-2
"""Spread above which float32 products, with errors of 1e-7, are accurate enough."""
NO_SPREAD = 1e-12
"""Spread up to which all tokens of an image count as equal."""
NORM_EPSILON = 1e-8
_blas = functools.cache(ThreadpoolController)


def similarities(features: np.ndarray | torch.Tensor) -> np.ndarray:
    """Cosine similarities of all pairs of tokens, float64 [N, T, T]; each matrix is exactly symmetric.

    features: float16 or float32 [N, H, W, C], numpy or torch. NaN or infinity in an image gives NaN similarities.
    """
    if isinstance(features, np.ndarray):
        features = as_tensor(features)
    # on the CPU: products of a GPU have other last bits, and results must not depend on it
    tokens = features.detach().cpu().flatten(1, 2)
    gram = _cosines(tokens, torch.float32)
    close = ~(spread(gram) > SINGLE_PRECISION_SPREAD)
    if close.any():
        gram[close] = _cosines(tokens[torch.from_numpy(close)], torch.float64)
    return gram


def spread(gram: np.ndarray) -> np.ndarray:
    """Mean squared distance of the tokens of each image to their mean, [N]; gram: [N, T, T]."""
    return np.trace(gram, axis1=1, axis2=2) / gram.shape[1] - gram.mean(axis=(1, 2))


def single_threaded_blas() -> contextlib.AbstractContextManager[object]:
    """Context with one BLAS thread, since the last bits of a product depend on the number of threads.

    BLAS threads would also compete with the threads that process different images.
    """
    return _blas().limit(limits=1, user_api="blas")


def _cosines(tokens_NTC: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """Inner products in `dtype`, then scaled by 1 / ((‖z_i‖ + 1e-8)(‖z_j‖ + 1e-8)): float64 [N, T, T]."""
    rows = tokens_NTC.to(dtype).numpy()
    with np.errstate(over="ignore", invalid="ignore"):  # callers detect NaN and infinity by their spread
        products = np.matmul(rows, rows.swapaxes(1, 2))  # BLAS uses syrk: half the work, symmetric result
    return _scaled(products)


@numba.njit(cache=True, nogil=True)
def _scaled(products: np.ndarray) -> np.ndarray:
    num_images, num_tokens, _ = products.shape
    cosines, inverse = np.empty(products.shape), np.empty(num_tokens)
    for n in range(num_images):
        for i in range(num_tokens):
            inverse[i] = 1.0 / (np.sqrt(np.float64(products[n, i, i])) + NORM_EPSILON)
        for i in range(num_tokens):
            for j in range(num_tokens):
                cosines[n, i, j] = products[n, i, j] * (inverse[i] * inverse[j])
    return cosines
