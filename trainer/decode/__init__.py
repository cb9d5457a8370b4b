"""Canvases → pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.decode.rae import load_rae_decoder

__all__ = ["load_rae_decoder"]


def __getattr__(name: str) -> Any:
    """Load the public name on first use, so that the configuration of a decoder can be read without torch."""
    if name in __all__:
        from trainer.decode import rae

        return getattr(rae, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
