"""What the operations keep for their backward passes, what they hold while they run, and how much they compute."""

import weakref

import pytest
import torch
from oracles import NAMES, make_case
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftlite.analysis import meters
from peftlite.kernels.dora_linear import dora_linear, dora_linears
from peftlite.kernels.lora_linear import lora_linear
from peftlite.kernels.weight_decomposed import DoRAArguments

M, INNER, OUTER, RANK = 64, 48, 80, 4
pytestmark = [
    pytest.mark.usefixtures("passes"),
    pytest.mark.parametrize("passes", ["small", "native"], indirect=True),
]


def call(case, leaves):
    arguments = [leaves[name] for name in NAMES if name in leaves]
    op = dora_linear if "magnitude" in leaves else lora_linear
    with torch.autocast("cpu", case.compute, enabled=case.compute is not None):
        return op(*arguments, case.scale, **case.options)


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


def saved_by(**kwargs):
    """Shapes and dtypes of the tensors saved for backward that are none of the inputs, with y's own named ``"y"``."""
    case = make_case(M, INNER, OUTER, RANK, **kwargs)
    leaves = case.inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = call(case, leaves)
    names = {storage(t): name for name, t in leaves.items() if t is not None} | {storage(y): "y"}
    found = {storage(t): names.get(storage(t)) or (*t.shape, t.dtype) for t in saved}
    return {what for what in found.values() if what not in ("weight", "bias", "lora_a", "lora_b", "magnitude")}


H, MASK = (M, RANK, torch.float32), (M * INNER // 8, torch.uint8)
N = (OUTER, torch.float32)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"x", H}),
        ({"needs": ("x", "lora_b")}, {H}),
        ({"needs": ("x",)}, {H}),
        ({"options": {"dropout": 0.3}}, {"x", H, MASK}),
        ({"stored": torch.bfloat16}, {"x", H}),
        ({"dora": True}, {"x", "y", H, N}),
        ({"dora": True, "needs": ("x", "lora_a", "lora_b")}, {"x", H, N}),
        ({"dora": True, "needs": ("x", "lora_b")}, {H, N}),
        ({"dora": True, "needs": ("lora_b",), "options": {"norm_grad": True}}, {"x", "y", H, N}),
        ({"dora": True, "options": {"dropout": 0.3}}, {"x", "y", H, N, MASK}),
        ({"dora": True, "options": {"keep_output": False}}, {"x", H, N}),
        ({"dora": True, "options": {"keep_output": False, "norm_grad": True}, "needs": ("lora_b",)}, {"x", H, N}),
    ],
)
def test_saved_for_backward(options, expected):
    assert saved_by(**options) == expected


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"dora": True}, {"dora": True, "options": {"dropout": 0.3, "dropout_mode": "peft"}}])
def test_under_autocast_no_copy_of_the_weight_is_saved(options, stored):
    saved = saved_by(stored=stored, compute=torch.bfloat16, **options)
    assert not [what for what in saved if what[:2] == (OUTER, INNER)]


class MemoryMeter(TorchDispatchMode):
    """Bytes of the live storages that operations have made, now and at most."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self.known.setdefault(tensor.untyped_storage()._cdata, 0)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                made = tensor.untyped_storage()
                self.known[made._cdata] = made.nbytes()
                self.now += made.nbytes()
                weakref.finalize(made, self.forget, made._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def forget(self, key):
        self.now -= self.known.pop(key)


def peaks(case):
    """Most bytes live in the forward and in the backward pass, over what there was when each began."""
    leaves = case.inputs()
    with MemoryMeter() as forward:
        y = call(case, leaves)
    with MemoryMeter() as backward:
        torch.autograd.grad(y, [t for t in leaves.values() if t is not None and t.requires_grad], case.dy)
    return forward.peak, backward.peak


def test_the_meter_sees_temporaries():
    x = torch.ones(1000)
    with MemoryMeter() as meter:
        x = ((x + 1) * 2).sum()
    assert (meter.now, meter.peak) == (4, 8000 + 4 - 4)


@pytest.mark.parametrize("rows", [500, 1024])
@pytest.mark.parametrize("dora", [False, True])
def test_forward_makes_one_output_and_backward_one_gradient(dora, rows, passes):
    """And with many rows the updated weight while its product runs, in DoRA's forward pass with any where W is small; native
    passes form none, and DoRA's backward pass makes D instead.
    """
    case = make_case(rows, 256, 384, 4, dora=dora)
    forward, backward = peaks(case)
    y, dx, small = 4 * rows * 384, 4 * rows * 256, 4 * 4 * (rows + 384 + 256)  # small: h, and what has the shape of A or B
    updated = 4 * 256 * 384
    if passes == "native":
        assert forward < y + 3 * small
        assert backward < dx + (y if dora else 0) + 4 * small
    else:
        assert forward < y + (updated if dora or rows == 1024 else 0) + 3 * small
        assert backward < dx + (updated if dora or rows == 1024 else 0) + 4 * small


def test_the_backward_pass_of_a_group_holds_one_scaled_gradient_at_a_time():
    rows, size, count = 200, 384, 3
    case = make_case(rows, size, size, RANK, dora=True)
    leaves = case.inputs()
    layers = [DoRAArguments(*(leaves[name] for name in NAMES[1:]), case.scale)] * count
    ys = dora_linears(leaves["x"], layers)
    with MemoryMeter() as meter:
        torch.autograd.grad(ys, leaves["x"], [case.dy] * count)
    dx = scaled = 4 * rows * size
    assert meter.peak < dx + scaled + 4 * count * 4 * RANK * (rows + 2 * size)


def test_a_16_bit_weight_is_never_whole_in_fp32():
    case = make_case(8, 2048, 1024, 4, dora=True, x=torch.bfloat16, stored=torch.bfloat16, options={"norm_grad": True})
    assert max(peaks(case)) < 4 * 2048 * 1024 / 2


def flops(case):
    leaves = case.inputs()
    trained = [t for t in leaves.values() if t is not None and t.requires_grad]
    return meters.flops(lambda: torch.autograd.grad(call(case, leaves), trained, case.dy))


def test_dora_computes_hardly_more_than_lora():
    lora, dora = (flops(make_case(512, 768, 768, 8, dora=dora)) for dora in (False, True))
    dense, factors = 4 * 512 * 768 * 768, 12 * 512 * 768 * 8
    assert lora == dense + factors
    assert lora < dora <= 1.03 * lora
