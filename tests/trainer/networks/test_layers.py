"""The padded way through a layer gives the numbers of the plain one."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from trainer.networks import layers


@pytest.mark.parametrize("bias", [False, True])
def test_padded_widths_change_nothing(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    mlp = layers.SwiGLU(6, 17, bias=bias).double()
    x, direction = torch.randn(2, 3, 5, 6, dtype=torch.float64)

    def found() -> list[Tensor]:
        mlp.zero_grad()
        with forward_ad.dual_level():
            out, tangent = layers.unpack_dual(mlp(layers.make_dual(x, direction)))
        assert tangent is not None
        out.square().sum().backward()
        return [out.detach(), tangent, *(p.grad.clone() for p in mlp.parameters() if p.grad is not None)]

    plain = found()
    assert len(plain) == (8 if bias else 5)
    widths = []
    monkeypatch.setattr(layers, "PADDED_ON", ("cpu",))
    product = layers.F.linear
    monkeypatch.setattr(
        layers.F, "linear", lambda x, w, b=None: (widths.append(tuple(w.shape)), product(x, w, b))[1]
    )
    torch.testing.assert_close(found(), plain, rtol=1e-12, atol=1e-12)
    assert {(64, 6), (6, 64)} == set(widths)
