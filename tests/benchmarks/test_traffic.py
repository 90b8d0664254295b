"""The byte meter on ATen calls whose traffic is known, and on Hugging Face PEFT, by which ours is judged."""

import peft
import pytest
import torch
from torch import Tensor, nn

from benchmarks.traffic import Access, Transfer, aten_traffic, passes, total_bytes

ROWS, COLUMNS, RANK = 56, 80, 8


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(lambda x: x + 1, 2, id="out of place: one read, one write"),
        pytest.param(lambda x: x.add_(1), 2, id="in place: the same"),
        pytest.param(lambda x: x.add(x), 3, id="the same tensor twice is read twice"),
        pytest.param(lambda x: x.zero_(), 1, id="overwritten, not read"),
        pytest.param(lambda x: torch.add(x, 1, out=torch.empty_like(x)), 2, id="out= is not read, empty moves nothing"),
        pytest.param(lambda x: x.t().view(x.shape[1], -1, 2)[:, 0], 0, id="views move nothing"),
        pytest.param(lambda x: x.sum(0), 1, id="a sum reads; its result is another tensor"),
        pytest.param(lambda x: x @ torch.empty(x.shape[1], 3), 1, id="a product reads each factor once"),
        pytest.param(lambda x: x.addmm_(torch.empty(x.shape[0], 3), torch.empty(3, x.shape[1])), 2, id="addmm_"),
        pytest.param(lambda x: torch.nn.functional.linear(x, torch.empty(3, x.shape[1]), torch.empty(3)), 1, id="linear"),
        pytest.param(lambda x: x.new_ones(1).expand(x.shape) + x, 2 + 1 / (ROWS * COLUMNS), id="expanded: read once"),
    ],
)
def test_passes_of_one_operation(function, expected):
    x = torch.randn(ROWS, COLUMNS)
    assert passes(aten_traffic(lambda: function(x)), x.numel(), 4) == expected


def test_bytes_are_those_of_all_tensors():
    x, w, bias = torch.randn(4, 5), torch.randn(3, 5), torch.randn(3)
    (transfer,) = aten_traffic(lambda: torch.addmm(bias, x, w.t()))
    factors = (Access("0", 3, 12, 0), Access("1", 20, 80, 0), Access("2", 15, 60, 0))
    assert transfer == Transfer("addmm", (*factors, Access("3", 12, 0, 48)))
    assert total_bytes([transfer]) == 12 + 80 + 60 + 48
    assert transfer.named("2").read == 60
    with pytest.raises(KeyError, match=r"addmm has no tensor 'weight'; it has 0, 1, 2, 3"):
        transfer.named("weight")


class Net(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.lin = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


@pytest.mark.parametrize(
    ("dora", "forward", "backward", "launches"),
    [(False, 7, 5, (5, 7)), (True, 16, 20, (17, 16))],
    ids=["LoRA", "DoRA"],
)
def test_passes_of_peft(dora: bool, forward: int, backward: int, launches: tuple[int, int]) -> None:
    """What the fused operations are compared with, all in bf16, without dropout, x with a gradient."""
    in_features = 48
    config = peft.LoraConfig(r=RANK, target_modules=["lin"], use_dora=dora)
    model = peft.get_peft_model(Net(in_features, COLUMNS).bfloat16(), config, autocast_adapter_dtype=False).train()
    x = torch.randn(ROWS, in_features, dtype=torch.bfloat16, requires_grad=True)
    outputs: list[Tensor] = []
    there = aten_traffic(lambda: outputs.append(model(x)))
    upstream = torch.randn(ROWS, COLUMNS, dtype=torch.bfloat16)
    back = aten_traffic(lambda: outputs[0].backward(upstream))
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert (passes(there, ROWS * COLUMNS, 2), passes(back, ROWS * COLUMNS, 2)) == (forward, backward)
    assert (len(there), len(back)) == launches
