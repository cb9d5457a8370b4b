"""Splits the tokens of an image in two by a normalised cut, which needs no random start.

    N images, T tokens of an image

Tokens are nodes of a graph with edge weights exp(sharpness · (cosine − 1)). The second eigenvector of D^-½ A D^-½
is the relaxed cut. It gives each token a score; weighted least squares find the threshold on the scores. (The source
takes the threshold of minimum cut cost, but for one photo in a hundred that threshold jumps to a distant value when
features are rounded to bfloat16.) Unlike 2-means, the cut does not prefer halves of equal size.

A fixed sharpness means another graph for each encoder. With sharpness = b / variance of the tokens of the image, edges
are Gaussian in the distance of two tokens, and the cut is the same when all their distances are multiplied. At b = 1
the graph is smooth and the halves are nearly those of 2-means; the larger b, the more they follow gaps between tokens.

Source: Shi and Malik (2000), Normalized Cuts and Image Segmentation, eq. 2 (cost) and §3 (relaxation).
"""

from __future__ import annotations

import numba
import numpy as np

from hierarchy_builder.hierarchy.similarity import NO_SPREAD, spread

SHARPNESS = 15.0
"""Decay of edge weights with cosine distance; from 5 to 20 the agreement with human segments hardly changed."""
BANDWIDTHS = (1.0, 2.0, 3.0)
"""Sharpness of the graphs of `centred_cut`, times the variance of the tokens: beyond 3 the halves explain clearly less
of the features than those of 2-means."""
TIE = 1e-9
"""A sharper graph has to separate the centre better by more than this, so that rounding does not choose."""
CHECKED_STEPS = 16
"""Number of Lanczos steps between two checks of convergence."""
RESIDUAL = 1e-7
"""‖M v − λ v‖ at which the eigenvector counts as converged; M has norm 1. Photos take 32 to 64 steps."""


def normalized_cut(gram: np.ndarray, sharpness: float | np.ndarray = SHARPNESS) -> np.ndarray:
    """Split the tokens of each image in two: uint8 [N, T] of 0 and 1, where it has no meaning which half is 1.

    gram: float64 [N, T, T], symmetric, finite, cosine similarities. sharpness: of all graphs, or of each [N]. The
    result depends neither on the order of the tokens nor on the other images. A single token, or tokens that are all
    equal, are not split and all get 0.
    """
    labels = np.zeros(gram.shape[:2], dtype=np.uint8)
    if gram.shape[1] > 1:
        _cut_images(gram, np.full(len(gram), sharpness, dtype=np.float64), labels)
        labels[spread(gram) <= NO_SPREAD] = 0
    return labels


def centred_cut(gram: np.ndarray, from_centre: np.ndarray) -> np.ndarray:
    """Of the cuts of each image at several bandwidths, the one whose halves differ most in distance to the centre.

    gram: as for `normalized_cut`. from_centre: float64 [T], distance of each token from the image centre, with which
    the halves are correlated; the smoothest graph is taken on a tie. Returns uint8 [N, T] as `normalized_cut` does.
    Source: the scale of the graph follows the data as in Zelnik-Manor and Perona (2004), Self-Tuning Spectral
    Clustering, here one scale for an image. That people put objects in the centre is what `paper` assumes too.
    """
    variance = spread(gram)
    variance[variance <= NO_SPREAD] = np.inf  # tokens that are all equal are not split whatever the graph
    best = np.zeros(gram.shape[:2], dtype=np.uint8)
    most = np.full(len(gram), -np.inf)
    away = from_centre - from_centre.mean()
    for bandwidth in BANDWIDTHS:
        labels = normalized_cut(gram, bandwidth / variance)
        share = labels.mean(axis=1)
        deviation = np.sqrt(share * (1 - share))
        separation = np.abs(labels @ away) / np.where(deviation > 0, deviation, 1)
        better = separation > most + TIE
        best[better], most[better] = labels[better], separation[better]
    return best


@numba.njit(cache=True, nogil=True)
def _cut_images(gram: np.ndarray, sharpness: np.ndarray, labels: np.ndarray) -> None:
    for n in range(gram.shape[0]):
        weights = np.exp(sharpness[n] * (gram[n] - 1.0))
        degrees = weights.sum(axis=1)
        score = _second_eigenvector(weights, degrees) / np.sqrt(degrees)
        _divide(score, degrees, labels[n])


@numba.njit(cache=True)
def _second_eigenvector(weights: np.ndarray, degrees: np.ndarray) -> np.ndarray:
    """Second eigenvector of M = D^-½ A D^-½ (the first is √d) by Lanczos with full reorthogonalisation."""
    num_tokens = degrees.size
    root = np.sqrt(degrees)
    matrix = weights / root.reshape(-1, 1) / root.reshape(1, -1)
    basis = np.zeros((num_tokens, num_tokens))
    basis[0] = root / np.sqrt(degrees.sum())
    projected = np.zeros((num_tokens, num_tokens))
    direction = np.cos(
        np.arange(num_tokens) + 1.0
    )  # any start vector works that is not orthogonal to the eigenvector
    vector = direction
    for step in range(1, num_tokens):
        for _ in range(2):  # a single pass leaves rounding errors as large as the removed part
            direction -= (basis[:step] @ direction) @ basis[:step]
        length = np.sqrt(direction @ direction)
        if step > 1:
            projected[step - 2, step - 1] = projected[step - 1, step - 2] = length
        if step % CHECKED_STEPS == 0 or (length <= RESIDUAL and step > 1):
            _, vectors = np.linalg.eigh(projected[: step - 1, : step - 1])
            vector = vectors[:, step - 2].copy() @ basis[1:step]
            if abs(vectors[step - 2, step - 2]) * length <= RESIDUAL:
                return vector
        basis[step] = direction / length
        direction = matrix @ basis[step]
        projected[step - 1, step - 1] = direction @ basis[step]
    _, vectors = np.linalg.eigh(projected[: num_tokens - 1, : num_tokens - 1])
    return vectors[:, num_tokens - 2].copy() @ basis[1:]


@numba.njit(cache=True)
def _divide(score: np.ndarray, weight: np.ndarray, labels: np.ndarray) -> None:
    """Label tokens 1 above the threshold that minimises weighted squared deviations from the means of both halves."""
    order = np.argsort(score, kind="mergesort")
    total_weight, total = weight.sum(), (weight * score).sum()
    below_weight, below = 0.0, 0.0
    best, best_gain = 0, 0.0
    for rank in range(order.size - 1):
        token, following = order[rank], order[rank + 1]
        below_weight += weight[token]
        below += weight[token] * score[token]
        gain = below**2 / below_weight + (total - below) ** 2 / (total_weight - below_weight)
        if score[following] > score[token] and gain > best_gain:
            best, best_gain = rank + 1, gain
    if best > 0:
        labels[order[best:]] = 1
