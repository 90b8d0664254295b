"""Layers that read the same input and run together: the same function, gradients, names and states as one by one."""

import copy
import pickle
import warnings

import pytest
import torch
from budgets import assert_within_budget
from torch import nn

import peftlite
from peftlite.fusion import can_fuse
from peftlite.kernels.lora_linear import LoRAArguments, lora_linears

GROUP = [("query", "key", "value")]


class Attention(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, 5, bias=False), nn.Linear(width, 7)

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        return torch.cat([self.query(x), self.key(memory), self.value(memory).tanh()], -1)


def build(method="lora", fuse=GROUP, dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(Attention(), nn.Linear(24, 12), Attention()).to(dtype)
    options |= {"method": method, "rank_pattern": {"0.key": 2}, "seed": 1, "fuse": fuse}
    peftlite.inject_adapters(model, ["query", "key", "value"], 3, **options)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for layer in peftlite.adapters(model).values():
            for parameter in layer.adapter_parameters().values():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def run(model, x, seed=3):
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = model(x)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y.square().sum(), [x, *trained.values()])
    return {"y": y.detach(), "x": grads[0], **dict(zip(trained, grads[1:], strict=True))}


def assert_same_output(actual, module, *inputs):
    """`actual` is what `module`, whose layers run one by one, computes, to the rounding of fp32."""
    with torch.no_grad():
        oracle = copy.deepcopy(module).double()(*(x.double() for x in inputs))
        assert_within_budget("y", actual.detach(), module(*inputs), oracle, torch.float32)


@pytest.mark.parametrize("shape", [(4, 12), (2, 3, 12), (1, 12), (0, 12)])
@pytest.mark.parametrize("options", [{}, {"norm_grad": True}], ids=str)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_together_equals_one_by_one(method, options, shape):
    if method == "lora" and options:
        options = {"rslora": True}
    torch.manual_seed(7)
    x = torch.randn(shape)
    together, alone = (build(method, fuse, **options) for fuse in (GROUP, ()))
    oracle = run(copy.deepcopy(alone).double(), x.double())
    eager, actual = run(alone, x), run(together, x)
    for name, value in actual.items():
        assert_within_budget(name, value, eager[name], oracle[name], torch.float32)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_gradients_in_fp64_and_autocast(method):
    model = build(method, dtype=torch.float64)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, (x,))
    with torch.autocast("cpu", torch.bfloat16):
        assert build(method)(torch.randn(3, 12)).dtype == torch.bfloat16


def test_the_layers_of_a_group_share_the_mask_of_dropout():
    model = build(dropout=0.5, fuse=[("query", "value")])[0]
    model.value.lora_a.data.copy_(model.query.lora_a)
    x = torch.ones(64, 12)
    layers = [LoRAArguments(m.weight, None, m.lora_a, torch.ones_like(m.lora_b), 1.0) for m in (model.query, model.value)]
    q, v = lora_linears(x, layers, dropout=0.5)
    low_rank = [y - x @ layer.weight.T for y, layer in zip((q, v), layers, strict=True)]
    assert torch.allclose(low_rank[0][:, :1], low_rank[1][:, :1], atol=1e-5)  # each column is Σ_r h: one h, one mask
    assert low_rank[0][:, 0].std() > 0


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_input_is_cast_and_saved_once(method):
    def saved(model):
        x, sizes = torch.randn(64, 12, requires_grad=True), {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = (tensor.dtype, tuple(tensor.shape))
            return tensor

        kept = []  # alive, so that no two of them share an address
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or pack(t), lambda t: t)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            kept.append(model[0](x))
        return sum(entry == (torch.bfloat16, (64, 12)) for entry in sizes.values())

    own = 1 if method == "dora" else 0  # the output of query, which DoRA keeps, has the same shape
    assert saved(build(method)) == 1 + own
    assert saved(build(method, fuse=())) == 3 + own


def test_an_unused_output_has_no_gradient_and_spoils_none():
    model = build()[0]
    x = torch.randn(4, 12, requires_grad=True)
    model(x)[..., :12].sum().backward()
    assert model.query.lora_b.grad is not None
    assert model.value.lora_b.grad is None or not model.value.lora_b.grad.any()
    assert x.grad.isfinite().all()


def test_a_group_that_reads_different_inputs_says_so_once_and_stays_right():
    model, alone = build()[0], build(fuse=())[0]
    x, memory = torch.randn(4, 12), torch.randn(4, 12)
    with pytest.warns(UserWarning, match=r"fuse: 0.query, .* 0.key was called with another tensor.* Leave them out"):
        actual = model(x, memory)
    assert_same_output(actual, alone, x, memory)  # query's came from a pass of all three
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(x, memory), alone(x, memory))


def test_an_input_written_between_two_layers_is_noticed():
    model, alone = build()[0], build(fuse=())[0]
    x = torch.randn(4, 12)
    with torch.no_grad():
        model.query(x)
        x.mul_(2)
        with pytest.warns(UserWarning, match="another tensor, or after a change of it"):
            actual = model.key(x)
        assert_same_output(actual, alone.key, x)


def test_interrupted_passes_leave_nothing_behind():
    model, alone = build()[0], build(fuse=())[0]
    x, other = torch.randn(4, 12), torch.randn(4, 12)
    model.query(x)  # and then, say, an exception
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_output(model(other), alone, other)


def test_disabled_merged_and_evaluated_layers_go_their_own_way():
    model, alone = build(dropout=0.3), build(fuse=(), dropout=0.3)
    x = torch.randn(4, 12)
    model.eval(), alone.eval()
    assert_same_output(model(x), alone, x)
    with peftlite.disable_adapters(model), peftlite.disable_adapters(alone):
        assert torch.equal(model(x), alone(x))
    model.train()
    model[0].key.eval()  # one layer alone
    assert model(x).isfinite().all()
    peftlite.merge_adapters(model)
    assert not peftlite.adapters(model)


def test_copies_pickles_states_and_files_are_those_of_layers_that_run_alone(tmp_path):
    model, alone = build(), build(fuse=())
    x = torch.randn(4, 12)
    assert list(model.state_dict()) == list(alone.state_dict())
    expected = model(x)
    model[0].query(x)  # outputs wait while the copies are made
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        assert twin[0].query.group is twin[0].key.group is not model[0].query.group
        assert twin[0].query in twin[0].query.group.layers
    peftlite.save_adapters(model, tmp_path / "a.safetensors")
    fresh = nn.Sequential(Attention(), nn.Linear(24, 12), Attention())
    fresh.load_state_dict(peftlite.remove_adapters(copy.deepcopy(model)).state_dict())
    peftlite.load_adapters(fresh, tmp_path / "a.safetensors")
    peftlite.fuse_adapters(fresh, GROUP)
    assert torch.equal(fresh(x), expected)


def test_gradient_checkpointing_and_inference_mode():
    model = build("dora")
    x = torch.randn(4, 12, requires_grad=True)
    expected = run(model, x)
    y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    grads = torch.autograd.grad(y.square().sum(), [p for p in model.parameters() if p.requires_grad])
    for (name, value), actual in zip(list(expected.items())[2:], grads, strict=True):
        assert torch.equal(actual, value), name
    with torch.inference_mode():
        assert torch.equal(model(x), expected["y"])


def test_compiled_code_runs_the_layers_one_by_one():
    model, alone = build(), build(fuse=())
    x = torch.randn(4, 12)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same_output(compiled(x), alone, x)


@pytest.mark.parametrize(
    ("fuse", "text"),
    [
        ([("query", "valeu")], r"fuse: \('query', 'valeu'\): 0 has no adapted layer 'valeu', only 'query'"),
        ([("kye", "vlaue")], r"\('kye', 'vlaue'\) names no adapted layer; there are key, query, value. Did you mean 'key'"),
        ([("query",)], r"fuse: \('query'\) is no group; name two or more"),
        ([("query", "query")], r"is no group"),
        ([("query", "key"), ("key", "value")], r"fuse: 0.key is in two groups"),
    ],
)
def test_groups_that_cannot_be_are_refused_and_the_model_is_as_before(fuse, text):
    model = nn.Sequential(Attention(), nn.Linear(24, 12), Attention())
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=text):
        peftlite.inject_adapters(model, ["query", "key", "value"], 2, fuse=fuse)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_method_without_a_form_for_several_layers_is_refused():
    model = nn.ModuleDict({"query": nn.Linear(4, 4), "key": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"fuse: the method 'vera' has no form for layers that run together; leave out fuse"):
        peftlite.inject_adapters(model, "all-linear", 2, method="vera", fuse=[("query", "key")])
    assert [name for name, method in peftlite.METHODS.items() if can_fuse(method)] == ["lora", "dora"]


def test_a_subclass_that_runs_in_its_own_way_does_not_run_together_in_another():
    class Own(peftlite.LoRALinear):
        def adapted_forward(self, x):
            return 2 * super().adapted_forward(x)

    class Both(Own):
        @classmethod
        def fused_forward(cls, layers, x):
            return [2 * y for y in super().fused_forward(layers, x)]

    class Same(peftlite.LoRALinear):
        pass

    assert (can_fuse(Own), can_fuse(Both), can_fuse(Same)) == (False, True, True)


def test_layers_of_different_width_are_refused():
    model = nn.ModuleDict({"query": nn.Linear(4, 4), "key": nn.Linear(5, 4)})
    with pytest.raises(ValueError, match=r"query, key cannot run together: .* lora of 4 and lora of 5 features"):
        peftlite.inject_adapters(model, "all-linear", 2, fuse=[("query", "key")])


def test_layers_with_other_options_are_refused():
    model = nn.ModuleDict({"query": nn.Linear(4, 4), "key": nn.Linear(4, 4)})
    peftlite.inject_adapters(model, "all-linear", 2)
    model["key"].dropout = 0.5
    with pytest.raises(ValueError, match=r"query, key cannot run together: their options differ"):
        peftlite.fuse_adapters(model, [("query", "key")])
