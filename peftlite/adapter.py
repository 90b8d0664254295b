"""AdapterLinear: the contract that every method keeps."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from peftlite.kernels.dispatch import compute_dtype
from peftlite.options import check_alpha, dtype_name, floating_dtype
from peftlite.quantization.linear import PackedWeight, QuantizedLinear, plain_linear
from peftlite.sharing import Shared, SharedPool


class AdapterLinear(nn.Module, ABC):
    """Compute ``y = x effective_weight()ᵀ + bias``, with the `weight` and `bias` of an ``nn.Linear`` frozen underneath.

    A method is a final subclass. `effective_weight` is its specification: the reference forward, merging, export and the
    tests follow from it. `adapted_forward` may compute the same in a cheaper way.

    The layer takes over the Parameter objects of the linear layer that it replaces, under their old names, so that
    checkpoints of the base model still load. What it adds to them is the adapter: all of its other parameters train, all
    of its other state is saved. A tensor that must not train is a buffer. Over a `QuantizedLinear` `weight` is its
    `PackedWeight`, likewise taken over; every method reads it through `base_weight`.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        rank: rank of the update, from 1 to ``min(in_features, out_features)``.
        bias: whether the frozen layer has a bias.
        device: where the frozen weight is made.
        dtype: dtype of the frozen weight.
        options: the keyword arguments of the method's `build`, and

            * ``adapter_dtype``: dtype of the adapter's tensors, or its name; by default fp32, or fp64 for an fp64 base.
            * ``base_dtype``: cast the frozen weight and bias to this dtype, once and for good, so that mixed precision
              need not cast them in every forward.
            * ``generator``: CPU generator that the initial values are drawn from; by default torch's global one.
            * ``pool``, ``name``: where the layer finds the tensors that it shares with others, and its own name there; by
              default it shares none.

    Raises:
        TypeError: for an option that the method does not have.
        ValueError: for a rank or an option out of range.
    """

    method: ClassVar[str]

    weight: Tensor | PackedWeight
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scale: float = 1.0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        self._take_over(nn.Linear(in_features, out_features, bias, device=device, dtype=dtype), rank, **options)

    @classmethod
    def from_linear(cls, linear: nn.Linear | QuantizedLinear, rank: int, **options: Any) -> Self:
        """Make a layer that takes over `weight` and `bias` of `linear`, and freezes them.

        Args:
            linear: the layer to adapt. Its parameters become those of the new layer; nothing is copied.
            rank: rank of the update.
            options: as in the constructor.
        """
        layer = cls.__new__(cls)
        layer._take_over(linear, rank, **options)
        return layer

    def _take_over(
        self,
        linear: nn.Linear | QuantizedLinear,
        rank: int,
        *,
        adapter_dtype: torch.dtype | str | None = None,
        base_dtype: torch.dtype | str | None = None,
        generator: torch.Generator | None = None,
        pool: SharedPool | None = None,
        name: str = "",
        **options: Any,
    ) -> None:
        known = list(inspect.signature(self.build).parameters)
        for option in options:
            if option not in known:
                raise TypeError(
                    f"{type(self).__name__} has no option {option!r}; its options are "
                    f"{', '.join([*known, 'adapter_dtype', 'base_dtype', 'generator', 'pool', 'name'])}."
                )
        self.check_rank(rank, linear.in_features, linear.out_features)
        super().__init__()
        self.in_features, self.out_features, self.rank = linear.in_features, linear.out_features, rank
        self.base_dtype = floating_dtype("base_dtype", base_dtype)
        if self.base_dtype is not None and isinstance(linear, QuantizedLinear):
            raise ValueError(
                f"base_dtype={base_dtype!r} was asked for a layer whose weight is quantised, and has no dtype to change; leave "
                "it out."
            )
        adapter_dtype = floating_dtype("adapter_dtype", adapter_dtype)
        self._adapter_dtype = adapter_dtype or torch.promote_types(linear.weight.dtype, torch.float32)
        self._generator, self._pool, self._name = generator, pool, name
        self._standing = "adapted"  # or "base", or "merged": see `disable_adapters` and `merged`
        self._merged_weight: Tensor | None = None
        self.group: Callable[[AdapterLinear, Tensor], Tensor] | None = None  # see `fuse_adapters`
        self.weight, self.bias = linear.weight, linear.bias
        before = [(p, p.data, p.requires_grad) for p in linear.parameters()]
        try:
            for parameter, data, _ in before:
                parameter.requires_grad_(False)
                if self.base_dtype is not None:
                    parameter.data = data.to(self.base_dtype)
            self.build(**options)
        except BaseException:
            for parameter, data, requires_grad in before:
                parameter.data = data
                parameter.requires_grad_(requires_grad)
            raise
        self._generator = self._pool = None
        self.train(linear.training)

    @staticmethod
    def check_rank(rank: int, in_features: int, out_features: int, where: str = "") -> None:
        """Raise a `ValueError` unless `rank` is an integer from 1 to ``min(in_features, out_features)``."""
        limit = min(in_features, out_features)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= limit:
            raise ValueError(
                f"{where}rank must be an integer from 1 to min(in_features, out_features) = {limit} for a layer of "
                f"{in_features} -> {out_features} features, got {rank!r}."
            )

    @abstractmethod
    def build(self) -> None:
        """Create the adapter's tensors; `weight`, `bias` and `rank` are in place. The keyword-only arguments of the
        method's own `build` are its options."""

    @abstractmethod
    def effective_weight(self) -> Tensor:
        """The dense weight ``(out, in)`` that the layer stands for, in the wider dtype of base and adapter."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Keyword arguments, as plain JSON values, with which `from_linear` rebuilds the layer."""

    def adapted_forward(self, x: Tensor) -> Tensor:
        """Compute ``x effective_weight()ᵀ + bias`` for x ``(..., in)``; a method may do it in a cheaper way."""
        return _linear(x, self.effective_weight(), self.bias)

    @classmethod
    def fused_forward(cls, layers: Sequence[Self], x: Tensor) -> list[Tensor]:
        """The outputs of several layers for one x ``(..., in)``; a method whose layers can share work defines it."""
        raise NotImplementedError(f"{cls.__name__} has no form for layers that run together.")

    def forward(self, x: Tensor) -> Tensor:
        """Map x ``(..., in)`` to ``(..., out)``."""
        if self._standing == "base":
            return self.base_forward(x)
        if self._standing == "merged":
            if self.training:
                raise RuntimeError(
                    "a layer inside merged(model) was run in training mode, where its adapter would get no gradient; "
                    "call model.eval() first, or leave the merged(model) block to train."
                )
            assert self._merged_weight is not None
            return _linear(x, self._merged_weight, self.bias)
        return self.adapted_forward(x) if self.group is None else self.group(self, x)

    def base_weight(self) -> Tensor:
        """The frozen weight ``(out, in)``; every method reads the base through this accessor.

        A quantised weight comes as a `PackedTensor`, which any operation on it makes dense for itself and which autograd
        saves in its packed form.
        """
        return self.weight.tensor() if isinstance(self.weight, PackedWeight) else self.weight

    def base_forward(self, x: Tensor) -> Tensor:
        """What the frozen layer computes for x ``(..., in)``, in autocast's dtype where it is on, else in that of x."""
        return _linear(x, self.base_weight(), self.bias)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's own parameters by name: all but `weight` and `bias`."""
        return {name: p for name, p in self.named_parameters() if not _of_base(name)}

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapter's own tensors by name, parameters and buffers: all of the state but `weight` and `bias`."""
        return {name: t for name, t in self.state_dict().items() if not _of_base(name)}

    @property
    def standing(self) -> str:
        """The function that the layer answers with, ``"adapted"``, ``"base"`` or ``"merged"``."""
        return self._standing

    def stand(self, standing: str, merged_weight: Tensor | None = None) -> tuple[str, Tensor | None]:
        """Answer with the ``"adapted"``, the ``"base"`` or the ``"merged"`` function from now on; returns what stood."""
        before = (self._standing, self._merged_weight)
        self._standing, self._merged_weight = standing, merged_weight
        return before

    def to_linear(self, weight: Tensor | PackedWeight | None = None) -> nn.Linear | QuantizedLinear:
        """A plain layer with the own frozen Parameters, or with `weight` written into them; a quantised one takes it over."""
        own: Any = self.weight
        if isinstance(own, PackedWeight) and weight is not None:
            own = weight if isinstance(weight, PackedWeight) else nn.Parameter(weight, requires_grad=False)
        elif weight is not None:
            with torch.no_grad():
                own.copy_(weight)
        return plain_linear(own, self.bias).train(self.training)

    def to_lora(self) -> tuple[Tensor, Tensor]:
        """Factors A ``(r, in)`` and B ``(out, r)``, the scale folded into B, with ``effective_weight() = base_weight() + B A``.

        They are copies without a graph, in the dtype of the adapter. Their rank need not be `rank`: methods that multiply
        or mix several factors need more. `convert_to_lora` does this for a whole model.

        Raises:
            ValueError: if the method's update is not of low rank; its merged weight is what it can be exported as.
        """
        raise ValueError(
            f"{type(self).__name__} cannot be written as plain LoRA: what it does to the base weight is no update of low "
            "rank. merge_adapters(model) folds it into the base weight, and effective_weight() is that weight."
        )

    def share(self, key: str | None, make: Callable[[torch.Generator | None], Shared], shape: tuple[int, ...]) -> Shared:
        """The module that the layers of one pool hold under `key`; `make` makes it for the first of them, from a generator
        that depends on the key alone. Without a pool, or where the key is None, the layer has one of its own.

        Raises:
            ValueError: if the tensor in it is not of the `shape`, device and dtype that this layer needs.
        """
        if self._pool is None or key is None:
            return make(self._generator)
        return self._pool.take(f"{self.method} {key}", self._name, make, (shape, self._adapter_dtype, self.weight.device))

    def set_scale(self, alpha: float | None, rslora: bool) -> None:
        """Set `scale` to ``alpha / rank``, or ``alpha / √rank`` with `rslora` (Kalajdzievski 2023, arXiv:2312.03732).

        `alpha` is the rank by default.
        """
        self.alpha = float(self.rank) if alpha is None else check_alpha(alpha)
        self.rslora = rslora
        self.scale = self.alpha / (math.sqrt(self.rank) if rslora else self.rank)

    def draw_uniform(self, *shape: int, bound: float, generator: torch.Generator | None = None) -> Tensor:
        """Values uniform in ±`bound`, on the layer's device, in the adapter's dtype, by default from the layer's generator."""
        if self.weight.device.type == "meta":
            return self.zeros(*shape)  # a large model has no values yet that are worth the time
        # Drawn on the CPU in fp32, so that a seed means the same values on every device and in every dtype.
        values = torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator or self._generator)
        return values.to(self.weight.device, self._adapter_dtype)

    def zeros(self, *shape: int) -> Tensor:
        """Zeros on the layer's device and in the adapter's dtype."""
        return torch.zeros(shape, device=self.weight.device, dtype=self._adapter_dtype)

    def create_factors(self, alpha: float | None, rslora: bool) -> None:
        """Create `lora_a` ``(r, in)``, uniform in ``±1/√in``, `lora_b` ``(out, r)``, zero, and `scale` by `set_scale`."""
        self.set_scale(alpha, rslora)
        self.lora_a = nn.Parameter(self.draw_uniform(self.rank, self.in_features, bound=1 / math.sqrt(self.in_features)))
        self.lora_b = nn.Parameter(self.zeros(self.out_features, self.rank))

    def basic_config(self) -> dict[str, Any]:
        """Rank and dtypes, as `config` wants them."""
        return {
            "rank": self.rank,
            "adapter_dtype": dtype_name(next(iter(self.adapter_parameters().values())).dtype),
            "base_dtype": dtype_name(self.base_dtype),
        }

    def low_rank_config(self) -> dict[str, Any]:
        """The options behind `create_factors`, as `config` wants them."""
        return {**self.basic_config(), "alpha": self.alpha, "rslora": self.rslora}

    def extra_repr(self) -> str:
        """Shape and options, for ``print(model)``."""
        options = ", ".join(f"{name}={value}" for name, value in self.config().items() if value is not None)
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {options}"


def _of_base(name: str) -> bool:
    """Whether a tensor of an adapted layer is the base's: `weight`, `bias`, or a part of a packed weight."""
    return name.partition(".")[0] in ("weight", "bias")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = compute_dtype(x)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
