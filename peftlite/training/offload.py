"""AdamW whose moments lie in host memory: Loshchilov and Hutter 2017, arXiv:1711.05101."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

BUCKET = 64 << 20  # bytes of moments that are on their way to the device, and back, at a time


class OffloadedAdamW(torch.optim.Optimizer):
    """Compute AdamW, ``p ← p - lr (m̂ / (√v̂ + eps) + weight_decay p)``, with m and v in host memory.

    The device holds parameters and gradients, and of the moments two buckets at a time: while one is used the next is on
    its way. The host's memory is pinned, so that the copies run beside the arithmetic. The arithmetic is torch's own, on the
    device of the parameter, so that every step gives the very bits of ``torch.optim.AdamW(foreach=False)``, and state dicts
    go from one to the other. On a CPU nothing is copied.

    It takes the place of the paged optimizers of QLoRA (Dettmers et al. 2023, arXiv:2305.14314), which need CUDA's unified
    memory: they move states when memory is short, this one at every step. It pays where the moments are large, as in full
    fine-tuning or at high ranks; adapters of small rank have moments of a few megabytes.

    Args:
        params: parameters or groups, as from `param_groups`.
        lr: learning rate.
        betas: decay of the running means of the gradient and of its square.
        eps: added to the root.
        weight_decay: decay per step, times `lr`.

    Raises:
        ValueError: for a value out of range.

    Example:
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> p.sum().backward()
        >>> optimizer = OffloadedAdamW([p], lr=0.1, weight_decay=0.0)
        >>> optimizer.step()
        >>> p.detach()
        tensor([0.9000, 0.9000])
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        if not lr >= 0 or not eps >= 0 or not weight_decay >= 0:
            raise ValueError(f"lr, eps and weight_decay must not be negative, got {lr!r}, {eps!r} and {weight_decay!r}.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas!r}.")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._streams: dict[torch.device, tuple[Any, Any]] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step; `closure` computes the loss again and returns it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, _ in work:
            if p.grad.is_sparse:
                raise ValueError("OffloadedAdamW takes dense gradients, and one is sparse; use torch.optim.SparseAdam for it.")
            if p.device.type not in ("cpu", "cuda"):
                raise ValueError(
                    f"OffloadedAdamW moves moments to CUDA devices, got a parameter on {p.device}; use torch's AdamW."
                )
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": _host(torch.zeros_like(p, device="cpu"), p),
                    "exp_avg_sq": _host(torch.zeros_like(p, device="cpu"), p),
                }
        buckets = _buckets(work)
        arriving = self._fetch(buckets[0]) if buckets else []
        for i, bucket in enumerate(buckets):
            moments, arriving = arriving, self._fetch(buckets[i + 1]) if i + 1 < len(buckets) else []
            for (p, group), (exp_avg, exp_avg_sq, ready) in zip(bucket, moments, strict=True):
                if ready is not None:
                    torch.cuda.current_stream(p.device).wait_event(ready)
                self._update(p, group, exp_avg, exp_avg_sq)
                if ready is not None:
                    self._send_back(p, exp_avg, exp_avg_sq)
        for _, back in self._streams.values():
            back.synchronize()  # the host may read the moments (state_dict) as soon as the step is over
        return loss

    def _update(self, p: Tensor, group: dict[str, Any], exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        beta1, beta2 = group["betas"]
        adamw(
            [p],
            [p.grad],  # type: ignore[list-item]
            [exp_avg],
            [exp_avg_sq],
            [],
            [self.state[p]["step"]],
            foreach=False,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _fetch(self, bucket: list[tuple[Tensor, dict[str, Any]]]) -> list[tuple[Tensor, Tensor, Any]]:
        """The moments of a bucket on the device of their parameters, each with the event after which they are there."""
        found: list[tuple[Tensor, Tensor, Any]] = []
        for p, _ in bucket:
            state = self.state[p]
            if p.device.type == "cpu":
                found.append((state["exp_avg"], state["exp_avg_sq"], None))
                continue
            if p.device not in self._streams:
                self._streams[p.device] = (torch.cuda.Stream(p.device), torch.cuda.Stream(p.device))
            there = self._streams[p.device][0]
            with torch.cuda.stream(there):
                moments = [state[key].to(p.device, non_blocking=True) for key in ("exp_avg", "exp_avg_sq")]
                ready = there.record_event()
            for moment in moments:
                moment.record_stream(torch.cuda.current_stream(p.device))
            found.append((moments[0], moments[1], ready))
        return found

    def _send_back(self, p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        back = self._streams[p.device][1]
        back.wait_stream(torch.cuda.current_stream(p.device))
        with torch.cuda.stream(back):
            self.state[p]["exp_avg"].copy_(exp_avg, non_blocking=True)
            self.state[p]["exp_avg_sq"].copy_(exp_avg_sq, non_blocking=True)
        exp_avg.record_stream(back)
        exp_avg_sq.record_stream(back)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of ``torch.optim.AdamW``; the moments stay on the host throughout."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        parameters = [p for group in self.param_groups for p in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = dict(zip(indices, parameters, strict=True))
        for index, state in state_dict["state"].items():
            p = own[index]
            moments = {key: _host(state[key].detach().to("cpu", p.dtype, copy=True), p) for key in ("exp_avg", "exp_avg_sq")}
            self.state[p] = {"step": torch.as_tensor(state["step"], dtype=torch.float32).cpu().clone(), **moments}


def _host(tensor: Tensor, p: Tensor) -> Tensor:
    """`tensor`, on the CPU, in pinned memory where `p` lies on a CUDA device."""
    return tensor.pin_memory() if p.device.type == "cuda" else tensor


def _buckets(work: list[tuple[Tensor, dict[str, Any]]]) -> list[list[tuple[Tensor, dict[str, Any]]]]:
    """`work` in pieces whose moments take `BUCKET` bytes at most, or hold a single parameter."""
    buckets: list[list[tuple[Tensor, dict[str, Any]]]] = []
    size = 0
    for p, group in work:
        if not buckets or size + 2 * p.nbytes > BUCKET:
            buckets.append([])
            size = 0
        buckets[-1].append((p, group))
        size += 2 * p.nbytes
    return buckets
