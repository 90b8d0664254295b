"""The estimate of a step's memory against the same step on real tensors, and what it leaves alone."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftlite
from peftlite import METHODS, benchmark_step, estimate_memory, inject_adapters, quantize_base
from peftlite.analysis.step import MIB

FP32 = 4


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Dropout(0.1), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 8))


def measured(net: nn.Module, batch, **options) -> float:
    """The step's own peak, in bytes, without the batch."""
    report = benchmark_step(net, batch, candidates={"as it is": lambda net: net}, rounds=1, warmup=1, **options)
    return report["as it is"].peak_mib * MIB


@pytest.mark.parametrize("method", METHODS)
def test_the_estimate_is_what_the_step_takes(method):
    net = inject_adapters(model(), ["0", "3"], 4, method=method, trainable="5", seed=0)
    x = torch.randn(16, 32)
    estimate = estimate_memory(net, x)
    # The meter of the real step does not see what a layer's cache kept from the step before; the estimate lists it.
    assert estimate.total - estimate.batch - estimate.other == measured(net, x)
    assert estimate.other == 0 or method == "dora"


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("prepare", ["full", "lora", "dora", "nf4"])
def test_in_either_precision_with_and_without_dropout(prepare, dropout, autocast):
    net = model()
    if prepare == "nf4":
        quantize_base(net, ["0", "3"])
    if prepare != "full":
        inject_adapters(net, ["0", "3"], 4, method="dora" if prepare == "dora" else "lora", dropout=dropout, seed=0)
    x = torch.randn(64, 32)
    estimate = estimate_memory(net, x, autocast=autocast)
    assert estimate.total - estimate.batch - estimate.other == measured(net, x, autocast=autocast)


def test_the_parts_of_a_layer_counted_by_hand():
    net, x = nn.Linear(5, 6), torch.randn(4, 5)
    estimate = estimate_memory(net, x)
    parameters = FP32 * (5 * 6 + 6)
    assert estimate.parameters == parameters
    assert estimate.batch == FP32 * 4 * 5
    assert estimate.optimizer_state == 2 * parameters + 2 * FP32  # two moments, and a step counter each
    assert (estimate.buffers, estimate.other) == (0, 0)
    assert estimate.saved == FP32 * 4 * 6  # the square keeps the output, the layer its input, which is the batch
    forward = estimate.phases["forward"]
    assert (forward.gradients, forward.saved) == (0, FP32 * 4 * 6)
    assert forward.transient == FP32 * (4 * 6 + 1)  # the squares and their mean
    optimizer = estimate.phases["optimizer"]
    assert (optimizer.gradients, optimizer.saved) == (parameters, 0)
    assert estimate.resident == parameters + estimate.batch + estimate.optimizer_state
    assert estimate.total == estimate.resident + estimate.phases[estimate.peak_phase].total
    lines = str(estimate).splitlines()
    assert lines[0].split()[-3:] == ["forward", "backward", "optimizer"]
    assert lines[-1] == f"{estimate.total / MIB:.2f} MiB at most, in the {estimate.peak_phase} phase"


def test_a_weight_of_two_holders_counts_once():
    net = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    net[1].weight = net[0].weight
    assert estimate_memory(net, torch.randn(2, 5)).parameters == FP32 * (25 + 5 + 5)


@pytest.mark.parametrize(("optimizer", "moments"), [("adamw", 2), ("adam", 2), ("sgd", 0)])
def test_optimizers_by_name(optimizer, moments):
    state = estimate_memory(nn.Linear(5, 6, bias=False), torch.randn(4, 5), optimizer=optimizer).optimizer_state
    assert state == moments * FP32 * 30 + (FP32 if moments else 0)


def test_an_optimizer_and_a_loss_of_ones_own():
    labels = torch.randint(8, (16,))  # a real tensor that the loss holds
    momentum = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    net, x = model(), torch.randn(16, 32)

    def loss(output: Tensor) -> Tensor:
        return F.cross_entropy(output, labels)

    estimate = estimate_memory(net, x, optimizer=momentum, loss=loss)
    assert estimate.optimizer_state == estimate.parameters
    assert estimate.total - estimate.batch == measured(net, x, optimizer=momentum, loss=loss)


@pytest.mark.parametrize("batch", [{"input": torch.randn(4, 5)}, (torch.randn(4, 5),)], ids=["mapping", "tuple"])
def test_batches_of_several_forms(batch):
    assert estimate_memory(nn.Linear(5, 6), batch) == estimate_memory(nn.Linear(5, 6), torch.randn(4, 5))


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.inner[:3], self.inner[3:]):
            x = checkpoint(layer, x, use_reentrant=False)
        return x


def test_gradient_checkpointing_is_followed():
    net, x = model(), torch.randn(64, 32)
    estimate = estimate_memory(Checkpointed(net), x)
    assert estimate.total - estimate.batch == measured(Checkpointed(net), x)
    assert estimate.saved < estimate_memory(net, x).saved


def test_a_model_that_does_not_train_has_a_forward_pass_alone():
    estimate = estimate_memory(model().requires_grad_(False), torch.randn(16, 32))
    assert list(estimate.phases) == ["forward"]
    assert (estimate.saved, estimate.optimizer_state) == (0, 0)


def test_model_gradients_random_state_and_tables_are_left_alone():
    net = inject_adapters(quantize_base(model(), ["0", "3"]), ["0", "3"], 4, method="dora", dropout=0.1, seed=0).eval()
    net(torch.randn(2, 32)).sum().backward()
    before = copy.deepcopy(net.state_dict())
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    random = torch.get_rng_state()
    estimate_memory(net, torch.randn(16, 32, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), random)
    assert not net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in net.named_parameters() if p.grad is not None)
    assert torch.isfinite(net(torch.randn(2, 32))).all()


def test_tables_first_made_during_an_estimate_hold_numbers_afterwards():
    peftlite.quantization.levels.decoding_table.cache_clear()
    net = quantize_base(nn.Sequential(nn.Linear(64, 32)), "0")
    x = torch.randn(4, 64)
    estimate_memory(net, x)
    dense = peftlite.dequantize_base(copy.deepcopy(net))
    assert torch.equal(net(x), dense(x))


def test_nothing_of_the_steps_size_is_allocated():
    # 512 GiB of activations: only a step without numbers gets through.
    wide = nn.Sequential(nn.Linear(8, 2**20), nn.Linear(2**20, 8)).to(torch.bfloat16)
    x = torch.empty(1, 8, dtype=torch.bfloat16).expand(2**18, 8)
    assert estimate_memory(wide, x).saved > 2**18 * 2**20 * 2 - 1


class Curious(nn.Module):
    def __init__(self, question) -> None:
        super().__init__()
        self.linear, self.question = nn.Linear(5, 5), question

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if self.question(x) else x


@pytest.mark.parametrize("question", [lambda x: x.max() > 0, lambda x: len(x.nonzero())], ids=["value", "shape"])
def test_a_model_that_asks_for_numbers_is_an_error(question):
    with pytest.raises(ValueError, match=r"tensors without numbers, and the model asks for some \(aten\..*benchmark_step"):
        estimate_memory(Curious(question), torch.randn(4, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "adamv"}, "unknown optimizer 'adamv'; there are 'adamw', 'adam', 'sgd', and a function makes one"),
        ({"loss": lambda output: output}, "loss must give a tensor with one element"),
        ({"batch": torch.empty(4, 5, device="meta")}, "model and batch lie on cpu, meta, and an estimate is for one"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"model": nn.Linear(5, 6), "batch": torch.randn(4, 5), **change}
    with pytest.raises(ValueError, match=message):
        estimate_memory(**arguments)


def test_an_output_that_is_no_tensor_needs_a_loss():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(ValueError, match="the model returns tuple, so give `loss`"):
        estimate_memory(Pair(5, 6), torch.randn(4, 5))
    assert estimate_memory(Pair(5, 6), torch.randn(4, 5), loss=lambda pair: pair[0].sum()).saved == 0
