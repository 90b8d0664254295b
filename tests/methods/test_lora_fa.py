"""LoRA-FA: A is frozen and no input is kept (Zhang et al. 2023), spec §19."""

import pytest
import torch
from nets import make_layer, perturb
from torch import Tensor

FA = ("lora_fa", {})


def saved_bytes(layer: torch.nn.Module, x: Tensor) -> int:
    """Bytes that the forward pass keeps for the backward pass, its own parameters and buffers aside."""
    own = {t.untyped_storage().data_ptr() for t in layer.state_dict(keep_vars=True).values()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert y.requires_grad
    return sum(kept.values())


def test_keeps_the_narrow_product_and_not_the_input() -> None:
    x = torch.randn(50, 64).requires_grad_()
    assert saved_bytes(make_layer(FA, 64, 32, 2), x) == 50 * 2 * 4
    assert saved_bytes(make_layer(("lora", {}), 64, 32, 2), x) == 50 * (2 + 64) * 4


def test_only_b_trains_and_as_in_lora() -> None:
    layer, lora = make_layer(FA, 9, 7, 3, alpha=5), make_layer(("lora", {}), 9, 7, 3, alpha=5)
    assert torch.equal(layer.lora_a, lora.lora_a)
    assert list(layer.adapter_parameters()) == ["lora_b"]
    perturb(layer)
    lora.load_state_dict(layer.state_dict())
    x = torch.randn(5, 9)
    for model in (layer, lora):
        model(x).square().sum().backward()
    assert torch.equal(layer(x), lora(x))
    assert torch.equal(layer.lora_b.grad, lora.lora_b.grad)
    assert not layer.lora_a.requires_grad


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("rslora", [True, False])
def test_orthogonal_a_makes_the_gradient_correction_the_identity(alpha: float | None, rslora: bool) -> None:
    for dtype in (torch.float64, torch.float32):
        layer = make_layer(FA, 9, 7, 4, dtype=dtype, alpha=alpha, rslora=rslora, orthogonal=True)
        a = layer.lora_a.double() * layer.scale
        rounding = 9 * 4 * torch.finfo(dtype).eps  # of a QR decomposition of a 9 x 4 matrix
        assert (a @ a.T - torch.eye(4)).abs().max() <= rounding
