"""A BERT layer with adapters on all six linears compiles into one graph and computes what eager code computes."""

import copy

import pytest
import torch
from budgets import assert_within_budget
from torch import Tensor

import peftlite
from examples.minbert_multitask.model import BertConfig, BertModel

SIZES = {"vocab_size": 11, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 72}


def outcome(layer: torch.nn.Module, x: Tensor, mask: Tensor, run: torch.nn.Module) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of all that trains, under the names that eager code gives them."""
    x = x.clone().requires_grad_()
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    y = run(x, mask)
    gradients = torch.autograd.grad((y * y.detach().cos()).sum(), [x, *trained.values()])
    return {"y": y.detach(), **dict(zip(["x", *trained], gradients, strict=True))}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own, inside
@pytest.mark.parametrize("method", ["lora", "dora"])  # the others: tests/test_contract.py
def test_an_adapted_layer_compiles_into_one_graph(method: str) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    layer = BertModel(BertConfig(**SIZES)).eval().encoder.layer[0]
    peftlite.inject_adapters(layer, "all-linear", 3, method=method, alpha=6)
    assert len(peftlite.adapters(layer)) == 6
    with torch.no_grad():
        for adapter in peftlite.adapters(layer).values():
            for parameter in adapter.adapter_parameters().values():
                parameter.add_(0.1 * torch.randn_like(parameter))
    x, mask = torch.randn(3, 7, SIZES["hidden_size"]), torch.ones(3, 1, 1, 7, dtype=torch.bool)
    mask[1, ..., 4:] = False
    actual = outcome(layer, x, mask, torch.compile(layer, fullgraph=True))
    eager = outcome(layer, x, mask, layer)
    wide = copy.deepcopy(layer).double()
    for key, expected in outcome(wide, x.double(), mask, wide).items():
        assert_within_budget(key, actual[key], eager[key], expected, torch.float32)
