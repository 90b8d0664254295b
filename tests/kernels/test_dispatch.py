import math
import os
import re
import subprocess
import sys

import pytest
import torch
from oracles import NAMES, make_case
from torch._subclasses.fake_tensor import FakeTensorMode

from peftlite.kernels import dispatch, native_library
from peftlite.kernels.dispatch import choose, compute_dtype, has_values
from peftlite.kernels.dora_linear import dora_linear
from peftlite.kernels.lora_linear import lora_linear


def call(dora=False, needs=(), options=None, **replaced):
    tensors = make_case(5, 7, 3, 2, dora=dora, needs=needs).tensors | replaced
    arguments = [tensors[name] for name in NAMES if name in tensors]
    return (dora_linear if dora else lora_linear)(*arguments, 0.5, **(options or {}))


def test_an_unknown_implementation_is_named_with_the_known_ones():
    message = "lora_linear: impl='trition' was asked for, but its implementations are reference, torch, triton; choose"
    message += " one of them"
    with pytest.raises(ValueError, match=re.escape(message)):
        call(options={"impl": "trition"})


def test_the_environment_replaces_auto_only(monkeypatch):
    tensors = (torch.ones(5, 7), torch.ones(3, 7))
    assert choose("op", "auto", *tensors) == "torch"
    monkeypatch.setenv("PEFTLITE_IMPL", "reference")
    assert choose("op", "auto", *tensors) == "reference"
    assert choose("op", "torch", *tensors) == "torch"
    monkeypatch.setenv("PEFTLITE_IMPL", "fast")
    assert choose("op", "torch", *tensors) == "torch"
    with pytest.raises(ValueError, match=r"dora_linear: PEFTLITE_IMPL=fast was asked for.*reference, torch"):
        call(dora=True)


@pytest.mark.parametrize("dora", [False, True])
def test_triton_without_a_gpu_is_refused_with_the_reason(dora, monkeypatch):
    message = "impl='triton' was asked for, but the kernels run on CUDA devices, and x is on cpu"
    with pytest.raises(ValueError, match=f"{re.escape(message)}.*use impl='torch', or 'auto'"):
        call(dora, options={"impl": "triton"})
    monkeypatch.setenv("PEFTLITE_IMPL", "triton")
    with pytest.raises(ValueError, match="PEFTLITE_IMPL=triton was asked for, but the kernels run on CUDA devices"):
        call(dora)


def test_triton_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(dispatch, "_triton_is_installed", lambda: False)
    with pytest.raises(ValueError, match=r"but Triton is not installed \(pip install triton\); use impl='torch'"):
        call(options={"impl": "triton"})


def test_triton_for_a_dtype_that_it_lacks_is_refused():
    with pytest.raises(ValueError, match="kernels compute in float32, float16 and bfloat16, and the computation is in float64"):
        call(options={"impl": "triton"}, x=torch.ones(5, 7, dtype=torch.float64))


class OnGPU:
    """As much of a tensor on a GPU as the choice looks at."""

    device, dtype = torch.device("cuda", 0), torch.bfloat16

    def __init__(self, *shape):
        self.shape = shape

    def is_floating_point(self):
        return True

    def numel(self):
        return math.prod(self.shape)


def test_auto_takes_triton_on_a_gpu_where_it_pays(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    weight = torch.empty(1000, 16, dtype=torch.bfloat16)
    assert choose("op", "auto", OnGPU(2, 50, 16), weight) == "triton"
    assert choose("op", "auto", OnGPU(1, 99, 16), weight) == "torch"
    assert choose("op", "triton", OnGPU(1, 99, 16), weight) == "triton"
    assert choose("op", "auto", OnGPU(2, 50, 16), weight.double()) == "torch"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose("op", "auto", OnGPU(1, 99, 16), weight) == "triton"
    monkeypatch.setattr(dispatch, "_triton_is_installed", lambda: False)
    assert choose("op", "auto", OnGPU(2, 50, 16), weight) == "torch"


def test_the_environment_decides_what_runs(monkeypatch):
    monkeypatch.setenv("PEFTLITE_IMPL", "reference")
    assert "Backward" in type(call(needs=("lora_a",)).grad_fn).__name__
    assert "LoRA" not in type(call(needs=("lora_a",)).grad_fn).__name__


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (5, 8), r"the last dimension of x must be in_features = 7, got x of shape (5, 8)"),
        ("lora_a", (2, 6), r"for weight (3, 7) lora_a must be (r, 7) and lora_b (3, r); got (2, 6) and (3, 2)"),
        ("lora_a", (1, 7), r"lora_b (3, r); got (1, 7) and (3, 2)"),
        ("lora_b", (4, 2), r"lora_b (3, r); got (2, 7) and (4, 2)"),
        ("bias", (1,), r"for weight (3, 7) bias must be (3,); got (1,)"),
    ],
)
def test_a_wrong_shape_is_named(dora, name, shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(dora, **{name: torch.ones(shape)})


@pytest.mark.parametrize("shape", [(1,), (3, 1), (7,)])
def test_a_magnitude_that_would_broadcast_is_refused(shape):
    with pytest.raises(ValueError, match=re.escape(f"magnitude must be (3,); got {shape}")):
        call(dora=True, magnitude=torch.ones(shape))


@pytest.mark.parametrize("dora", [False, True])
def test_a_weight_that_trains_is_refused(dora):
    weight = torch.ones(3, 7, requires_grad=True)
    with pytest.raises(ValueError, match=r"weight requires a gradient.*call weight.requires_grad_\(False\)"):
        call(dora, weight=weight)
    with torch.no_grad():
        assert call(dora, weight=weight).shape == (5, 3)


@pytest.mark.parametrize("dora", [False, True])
def test_integers_are_refused(dora):
    with pytest.raises(ValueError, match=r"x must be a floating point tensor, got torch.int64; convert it first"):
        call(dora, x=torch.ones(5, 7, dtype=torch.int64))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_dropout_out_of_range(dora, dropout):
    with pytest.raises(ValueError, match=rf"dropout must be in \[0, 1\), got {dropout}"):
        call(dora, options={"dropout": dropout})


def test_an_unknown_dropout_mode():
    with pytest.raises(ValueError, match=r"dora_linear: dropout_mode must be 'lowrank' or 'peft', got 'hf'"):
        call(dora=True, options={"dropout_mode": "hf"})


def test_autocast_decides_the_dtype_except_for_fp64():
    dtypes = (torch.float64, torch.float32, torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        assert [compute_dtype(torch.ones(1, dtype=d)) for d in dtypes] == [torch.float64, torch.bfloat16, torch.bfloat16]
    assert [compute_dtype(torch.ones(1, dtype=d)) for d in dtypes] == list(dtypes)


@pytest.mark.parametrize("dora", [False, True])
def test_shapes_can_be_had_on_the_meta_device(dora):
    tensors = make_case(5, 7, 3, 2, dora=dora, needs=()).tensors
    y = call(dora, **{name: None if t is None else t.to("meta") for name, t in tensors.items()})
    assert (y.device.type, y.shape) == ("meta", call(dora).shape)


@pytest.mark.parametrize("dora", [False, True])
def test_both_passes_run_on_fake_tensors(dora):
    tensors = make_case(5, 7, 3, 2, dora=dora, needs=("x", "lora_a")).tensors
    mode = FakeTensorMode()
    fake = {name: None if t is None else mode.from_tensor(t) for name, t in tensors.items()}
    assert has_values(tensors["x"])
    assert not has_values(fake["x"])
    assert not has_values(tensors["x"].to("meta"))
    with mode:
        call(dora, **fake).sum().backward()
    assert fake["lora_a"].grad.shape == tensors["lora_a"].shape


@pytest.mark.skipif(native_library.library() is None, reason="built without the native passes: no C compiler")
@pytest.mark.parametrize("value", ["0", "1"])
def test_the_environment_switches_the_native_passes_off(value):
    code = "from peftlite.kernels import native_library; print(native_library.library() is None)"
    environment = os.environ | {"PEFTLITE_NATIVE": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(value == "0")
