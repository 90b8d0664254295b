"""Controllers: once per optimizer step, with any implementation of it; the same after a resume and in two processes."""

import copy
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import net, perturb, refused
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from peftlite import LISA, AdaLoRA, Controller, DyLoRA, RefLoRA, XGBLoRA, inject_adapters, param_groups
from peftlite.methods.dylora import DyLoRALinear

Make = Callable[[nn.Module, Optimizer], Controller]
KINDS: dict[str, tuple[str | None, Make]] = {  # the method of the model, and the controller
    "adalora": ("adalora", lambda m, o: AdaLoRA(m, o, total_steps=12, target_rank=2, initial_steps=2, final_steps=4)),
    "dylora": ("dylora", lambda m, o: DyLoRA(m, o, seed=3)),
    "reflora": ("lora", lambda m, o: RefLoRA(m, o, warmup_steps=2)),
    "reflora-s": ("dora", lambda m, o: RefLoRA(m, o, variant="scalar", warmup_steps=2)),
    "xgblora": ("xgblora", lambda m, o: XGBLoRA(m, o, steps_per_round=3, layers_per_round=1, seed=3)),
    "lisa": (None, lambda m, o: LISA(m, o, "encoder", active=1, period=2, seed=3)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
STEPS = {"for loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def made(kind: str, step: str = "foreach") -> tuple[nn.Module, Optimizer, Controller]:
    """A net with batch norm in evaluation mode, its AdamW, and the controller."""
    method, make = KINDS[kind]
    model = net()
    if method is not None:
        inject_adapters(model, "all-linear", 3, method=method, trainable="head", seed=0)
    model.head[1].eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(param_groups(model, 0.02), **STEPS[step])
    return model, optimizer, make(model, optimizer)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The data of step `step`."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 8, generator=generator), torch.randn(8, 3, generator=generator)


def train(model: nn.Module, optimizer: Optimizer, steps: range, scaler: Any = None, accumulate: int = 1) -> None:
    """The plain loop that a user has."""
    for step in steps:
        x, target = batch(step)
        for part_x, part_target in zip(x.chunk(accumulate), target.chunk(accumulate), strict=True):
            loss = F.mse_loss(model(part_x), part_target) / accumulate
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()


def trained(kind: str, step: str = "foreach", **options: Any) -> tuple[nn.Module, Controller]:
    """Model and controller after 12 steps."""
    model, optimizer, controller = made(kind, step)
    train(model, optimizer, range(12), **options)
    assert controller.step == 12
    return model, controller


def assert_equal_states(actual: nn.Module, expected: nn.Module) -> None:
    """Fail unless both models hold the same values, bit for bit."""
    for key, value in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[key], value), key


def drawn(controller: Controller) -> Any:
    """What a controller has drawn for its next step; None for those that draw nothing."""
    found = getattr(controller, "rank", getattr(controller, "chosen", None))
    return found() if callable(found) else found


def apart(first: nn.Module, second: nn.Module) -> float:
    """The largest difference between the outputs of two models."""
    x = batch(99)[0]
    return (first.eval()(x) - second.eval()(x)).abs().max().item()


@every_kind
def test_it_matters_and_the_implementation_of_the_step_does_not(kind: str) -> None:
    loop, foreach, fused = (trained(kind, step)[0] for step in STEPS)
    model, optimizer, controller = made(kind)
    controller.detach()
    train(model, optimizer, range(12))
    difference = apart(model, loop)
    assert difference > 0
    # Implementations round differently, and Adam amplifies it; what the controller does must be no question of that.
    assert max(apart(foreach, loop), apart(fused, loop)) < difference / 100


@every_kind
@pytest.mark.parametrize("step", STEPS)
def test_a_scale_changes_nothing(kind: str, step: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # a power of two, which only shifts exponents
    assert_equal_states(trained(kind, step, scaler=scaler)[0], trained(kind, step)[0])


@every_kind
@pytest.mark.parametrize("step", ["foreach", "fused"])
def test_a_step_that_the_scaler_skips_is_none(kind: str, step: str) -> None:
    model, optimizer, controller = made(kind, step)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    train(model, optimizer, range(3), scaler)
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(controller.state_dict())
    scaler.scale(model(batch(3)[0]).sum() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert controller.step == 3
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert str(controller.state_dict()) == str(state)
    train(model, optimizer, range(3, 12), scaler)
    assert_equal_states(model, trained(kind, step)[0])


@every_kind
def test_with_accumulation_it_acts_once_per_optimizer_step(kind: str) -> None:
    calls = []
    model, optimizer, controller = made(kind)
    after = controller.after_step
    controller.after_step = lambda: (calls.append(controller.step), after())[1]  # type: ignore[method-assign]
    train(model, optimizer, range(12), accumulate=4)
    assert calls == list(range(1, 13))
    # Sums in another order, which Adam amplifies; four times as many draws would be another training altogether.
    plain, other = made(kind), trained(kind)[0]
    plain[2].detach()
    train(plain[0], plain[1], range(12))
    assert apart(model, other) < apart(plain[0], other) / 100


@every_kind
def test_a_resume_in_the_middle_changes_nothing(kind: str, tmp_path: Path) -> None:
    whole = trained(kind)[0]
    for stop in (3, 9):
        model, optimizer, controller = made(kind)
        train(model, optimizer, range(stop))
        parts = {"model": model, "optimizer": optimizer, "controller": controller}
        torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "state")
        saved = torch.load(tmp_path / "state", weights_only=True)
        model, optimizer, controller = made(kind)
        for name, part in {"model": model, "optimizer": optimizer, "controller": controller}.items():
            part.load_state_dict(saved[name])
        assert controller.step == stop
        train(model, optimizer, range(stop, 12))
        assert_equal_states(model, whole)


@every_kind
def test_detach_leaves_nothing_behind(kind: str) -> None:
    def look(model: nn.Module, optimizer: Optimizer) -> list[Any]:
        modules = [(n, sorted(vars(m)), {k for k, b in m._buffers.items() if b is not None}) for n, m in model.named_modules()]
        hooks = len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)
        return [modules, [(n, p.requires_grad) for n, p in model.named_parameters()], hooks, sorted(vars(optimizer))]

    make = KINDS[kind][1]
    model, optimizer, controller = made(kind)
    controller.detach()
    before = look(model, optimizer)
    with make(model, optimizer) as controller:
        assert controller.attached
        with pytest.raises(ValueError, match=rf"a {controller.name} is attached to this optimizer already; call its detach"):
            make(model, optimizer)
        train(model, optimizer, range(5))
    assert not controller.attached
    assert look(model, optimizer) == before
    controller.detach()  # a second time does nothing
    taken = controller.step
    train(model, optimizer, range(2))
    assert controller.step == taken
    alive = weakref.ref(controller)
    del controller
    gc.collect()
    assert alive() is None


@every_kind
def test_states_that_do_not_fit(kind: str) -> None:
    _, _, controller = made(kind)
    state = controller.state_dict()
    with pytest.raises(ValueError, match=rf"the state is one of 'Other', and this is a {controller.name}"):
        controller.load_state_dict({**state, "controller": "Other"})
    with pytest.raises(ValueError, match=r"does not fit: missing \['step'\], left over \['more'\]"):
        controller.load_state_dict({**{k: v for k, v in state.items() if k != "step"}, "more": 1})
    key = next(iter(state["settings"]))
    with pytest.raises(ValueError, match=rf"was saved with {key}='other', and this one has {key}=.* make it with the same"):
        controller.load_state_dict({**state, "settings": {**state["settings"], key: "other"}})


@every_kind
def test_an_optimizer_that_lacks_something(kind: str) -> None:
    method, make = KINDS[kind]
    model = net() if method is None else inject_adapters(net(), "all-linear", 3, method=method)
    part = [p for p in model.parameters() if p.requires_grad][1:]
    with refused(model, r"lacks 'encoder.0.query.* and \d+ more of the \d+ .*make the optimizer from param_groups"):
        make(model, torch.optim.SGD(part, lr=0.1))


@pytest.mark.parametrize(("kind", "other"), [("adalora", "dylora"), ("dylora", "lora"), ("reflora", "adalora")])
def test_a_model_of_another_method(kind: str, other: str) -> None:
    method, make = KINDS[kind]
    model = inject_adapters(net(), "query", 2, method=other)
    optimizer = torch.optim.SGD(param_groups(model, 0.1))
    with refused(model, rf"is for layers of method '{method}'.*Net has none \(its adapters are of {other}\); call inject_"):
        make(model, optimizer)
    with refused(plain := net(), r"and Net has none \(it carries no adapters\); call inject_adapters\(\.\.\., method="):
        make(plain, torch.optim.SGD(plain.parameters(), lr=0.1))


def test_closures_wrappers_and_seeds_are_refused() -> None:
    model, optimizer, controller = made("lisa")
    with pytest.raises(RuntimeError, match=r"LISA needs the gradients before the step, and a closure computes them inside"):
        optimizer.step(lambda: 0.0)
    controller.detach()
    with pytest.raises(ValueError, match=r"LISA attaches to the step hooks of a torch.optim.Optimizer, got object"):
        LISA(model, object(), "encoder")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"seed must be an integer, got 0.5"):
        LISA(model, optimizer, "encoder", seed=0.5)  # type: ignore[arg-type]


def test_draws_depend_on_seed_and_step_alone() -> None:
    """Invariant §20: what is drawn depends on seed and step alone, in every process."""
    _, _, first = made("dylora")
    torch.manual_seed(8)
    draw = [torch.rand(3, generator=first.generator(step)) for step in (0, 1, 0)]
    assert torch.equal(draw[0], draw[2])
    assert not torch.equal(draw[0], draw[1])
    first.seed += 1
    assert not torch.equal(draw[0], torch.rand(3, generator=first.generator(0)))


@every_kind
def test_wrapped_models(kind: str) -> None:
    make = KINDS[kind][1]
    model, optimizer, controller = made(kind)
    controller.detach()
    assert make(torch.compile(model, backend="eager"), optimizer).model is model  # type: ignore[arg-type]


WORKER = """
import sys
import warnings
import torch
import torch.distributed as dist
from torch import nn
sys.path.insert(0, sys.argv[1])
import test_controller as t

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, found = dist.get_rank(), {}
for kind in t.KINDS:
    torch.manual_seed(rank)  # nothing drawn may depend on it
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, optimizer, controller = t.made(kind)
    assert [("wrap first" in str(w.message)) for w in caught] == [True] * (kind == "lisa")
    controller.detach()
    if kind == "lisa":
        try:
            t.KINDS[kind][1](nn.parallel.DistributedDataParallel(model), optimizer)
        except ValueError as error:
            assert "make it with find_unused_parameters=True" in str(error)
        else:
            raise AssertionError("not refused")
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    controller = t.KINDS[kind][1](parallel, optimizer)
    chosen = []
    for step in range(12):
        if step == 6:  # a resume in the middle
            state, own = controller.state_dict(), optimizer.state_dict()
            controller.detach()
            controller = t.KINDS[kind][1](parallel, optimizer)
            optimizer.load_state_dict(own)
            controller.load_state_dict(state)
        chosen.append(t.drawn(controller))
        x, target = t.batch(step)
        t.F.mse_loss(parallel(x[rank::2]), target[rank::2]).backward()
        optimizer.step()
        optimizer.zero_grad()
    found[kind] = {"chosen": chosen, "state": model.state_dict()}
torch.save(found, f"{sys.argv[2]}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_act_alike(tmp_path: Path) -> None:
    """Invariant §20: what is drawn depends on seed and step alone, in every process."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    root = Path(__file__).resolve().parents[1]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    arguments = [*run, str(root / "tests"), str(tmp_path)]
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for kind, found in first.items():
        model, optimizer, controller = made(kind)
        alone = []
        for step in range(12):
            alone.append(drawn(controller))
            train(model, optimizer, range(step, step + 1))
        assert found["chosen"] == second[kind]["chosen"] == alone
        assert all(torch.equal(value, second[kind]["state"][key]) for key, value in found["state"].items()), kind
    assert len(set(map(str, first["dylora"]["chosen"]))) > 1
    assert len(set(map(str, first["lisa"]["chosen"]))) > 1
    assert len(set(map(str, first["xgblora"]["chosen"]))) > 1


def test_what_is_drawn_stays_out_of_evaluation_and_of_the_file() -> None:
    model, _, controller = made("dylora")
    perturb(model)
    x, keys = batch(0)[0], set(model.state_dict())
    sampled, whole = model.train()(x), model.eval()(x)
    assert not torch.equal(sampled, whole)
    controller.detach()
    assert set(model.state_dict()) == keys
    assert torch.equal(model.eval()(x), whole)
    assert all(m.drawn is None for m in model.modules() if isinstance(m, DyLoRALinear))
