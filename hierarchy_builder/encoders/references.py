"""Probe values of known encoders, by (hash of the weights, output of an ONNX model or "").

`hierarchy-builder encoders --probe NAME [--weights FILE] --json` computes them, in float32 on a CPU. Only `dct` is
listed: of trained weights no value has been computed yet. What is not listed is recorded in the manifest of the first
run instead, and compared from then on.
"""

from __future__ import annotations

REFERENCES: dict[tuple[str, str], tuple[float, ...]] = {
    # dct: 256 px, 16×16×48; the hash is that of its basis.
    ("434b247383948414a28a1a0019812889c23f25c2a447b44a3bc45497a01777c8", ""): (
        *(0.15975, 0.63668, 0.15426, 0.87288),
        *(0.24754, 0.52159, 0.16954, 0.882),
        *(0.13785, 0.98349, 0.97629, 0.83722),
    ),
}
"""Twelve numbers each, see `encoders/probe.py`."""
