"""row_norm: ``n = ‖W + s B A‖_row`` and its gradient without a dense ``B A``, for DoRA (Liu et al. 2024, arXiv:2402.09353)."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

from peftlite.kernels import native, native_library
from peftlite.kernels.dispatch import has_values, without_autocast

CPU_BLOCK = 1 << 17  # elements: 512 KiB in fp32, which stay in cache
DEVICE_BLOCK = 1 << 24  # elsewhere a block bounds the memory, and each costs launches
SMALL = 1 << 18  # elements of W: up to here forming W + s B A costs less than the many operations that avoid it
CANCELLATION = 0.5  # n² below this share of ‖W‖²: the expanded square has lost digits


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """fp32, or fp64 where one of the tensors is fp64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


class BaseSquare:
    """``‖W‖²`` of each row of a weight, kept from one call to the next and computed again when the weight has changed.

    Along with it goes the image ``W p`` of a fixed vector p. Whoever needs ``‖W‖²`` forms ``W p`` anew, which costs next to
    nothing beside ``W Aᵀ``, and compares every bit of all rows: that sees any change of W, by whatever means it was
    written, that would change ``‖W‖²`` by more than the rounding of that product.
    """

    def __init__(self) -> None:
        self._probe: Tensor | None = None
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None

    def probe(self, a: Tensor) -> Tensor:
        """The vector p ``(1, in)``, in the dtype of `a`: of either sign and between 1 and 2 in size."""
        if self._probe is None or self._probe.shape[1] != a.shape[1] or self._probe.dtype != a.dtype:
            generator = torch.Generator().manual_seed(a.shape[1])
            size = 1 + torch.rand(1, a.shape[1], generator=generator, dtype=torch.float64)
            self._probe = (size * (2 * torch.randint(2, size.shape, generator=generator) - 1)).to(a.dtype)
        return self._probe

    def __call__(self, image: Tensor, weight: Tensor, acc: torch.dtype) -> tuple[Tensor, Tensor]:
        """``‖W‖² (out,)`` in `acc`, and the share of it below which a sum counts as cancelled, for ``image = W p``."""
        kept = self._kept
        if (
            kept is None
            or (kept[0].dtype, kept[1].dtype) != (image.dtype, acc)
            or (has_values(image) and not torch.equal(kept[0], image))
        ):
            square = _base_square(weight, acc)
            kept = self._kept = image.clone(), square, square * CANCELLATION
        return kept[1:]


@torch.no_grad()
def row_norm(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    base_square: BaseSquare | None = None,
    compute: torch.dtype | None = None,
) -> Tensor:
    """Compute ``n_j = ‖W_j + s (B A)_j‖``, ``(out,)``, in fp32 at least and without a gradient.

    Every row is computed directly: on CPU by one native pass where that serves (`peftlite.kernels.native`), a small weight at
    once, and on other devices a large one block by block. Without the native pass the square of a large weight on CPU is
    expanded, ``n² = ‖W‖² + 2 s ⟨B, W Aᵀ⟩_row + s² ⟨B, B (A Aᵀ)⟩_row``, which makes ``out x r`` temporaries only; rows that
    cancel (``W ≈ -s B A``) are computed again directly. On other devices looking for these would make the host wait.

    Args:
        weight: ``(out, in)``, any floating dtype.
        lora_a: ``(r, in)``.
        lora_b: ``(out, r)``.
        scale: the factor ``s``.
        base_square: keeps ``‖W‖²`` of this weight, which spares the expansion one of its two readings of W.
        compute: dtype of the layer's products. Where W is stored in the same 16 bits, the expansion takes ``W Aᵀ`` in them
            too, like every other product of the layer, for half of the time: n then errs by up to ``eps ⟨|B|, |W Aᵀ|⟩ / n``,
            a share of eps of what the adapter does to it.

    Example:
        >>> row_norm(torch.tensor([[3.0, 4.0]]), torch.ones(1, 2), torch.zeros(1, 1), 1.0)
        tensor([5.])
    """
    with without_autocast(weight.device):  # also where a layer is made under autocast
        acc = accumulation_dtype(weight, lora_a, lora_b)
        a, b = lora_a.to(acc), lora_b.to(acc)
        if weight.is_contiguous() and native_library.serves(lora_a.shape[0], a, b):
            if native_library.reads(weight):
                return native.row_norm(weight, a, b, scale)
            # A packed weight of one block comes as it is, and a clone is dense.
            dense = ((rows, w if type(w) is Tensor else w.clone()) for rows, w in _blocks(weight, acc))
            return torch.cat([native.row_norm(w, a, b[rows], scale) for rows, w in dense])
        if weight.numel() <= SMALL:
            return _direct(weight.to(acc), a, b, scale)
        if weight.device.type != "cpu":
            return torch.cat([_direct(w, a, b[rows], scale) for rows, w in _blocks(weight, acc)])
        # The probe makes one more column of `cross`. B has a column of zeros beside it, so that all that follows runs over
        # contiguous matrices, which on CPU takes less time than the same over their first r columns.
        rows_of_a = a if base_square is None else torch.cat([a, base_square.probe(a)])
        factors = b if base_square is None else F.pad(b, (0, 1))
        if weight.dtype == compute and compute.itemsize == 2:
            cross = (weight @ rows_of_a.to(compute).T).to(acc)  # W [A; p]ᵀ, (out, r + 1)
        else:
            cross = torch.empty(factors.shape, dtype=acc)
            for rows, w in _blocks(weight, acc):
                torch.mm(w, rows_of_a.T, out=cross[rows])
        if base_square is None:
            base = _base_square(weight, acc)
            floor = base * CANCELLATION
        else:
            base, floor = base_square(cross[:, -1], weight, acc)
        cross.addmm_(factors, rows_of_a @ rows_of_a.T, beta=2 * scale, alpha=scale * scale).mul_(factors)
        square = torch.addmv(base, cross, cross.new_ones(cross.shape[1]))
        if not has_values(square) or torch.equal(torch.maximum(square, floor), square):
            return square.sqrt_()
        few = (square < floor).nonzero().squeeze(1)  # a square below 0 is among them
        norm = square.sqrt_()
        norm[few] = _direct(weight[few].to(acc), a, b[few], scale)
        return norm


@torch.no_grad()
def inverse_norm_gradients(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, gradient: Tensor, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of ``Σ_j c_j n⁰_j / n_j(A, B)`` at ``n = n⁰``: what a gain ``m / n`` adds to those of the factors.

    With ``q = c / n²``: ``da = -s (q ⊙ B)ᵀ (W + s B A)`` and ``db = -s q ⊙ (W Aᵀ + s B A Aᵀ)``.

    Args:
        weight: ``(out, in)``.
        lora_a: ``(r, in)``.
        lora_b: ``(out, r)``.
        scale: the factor ``s``.
        gradient: ``c (out,)``, the gradient of the loss with respect to ``ln g``, that is ``g ∂L/∂g``.
        norm: ``n (out,)``, not below `eps`.
        eps: rows whose norm is at this floor have no gradient.

    Returns:
        ``da (r, in)`` and ``db (out, r)`` in the dtypes of the factors.
    """
    acc = accumulation_dtype(weight, lora_a, lora_b)
    a, b = lora_a.to(acc), lora_b.to(acc)
    q = torch.where(norm > eps, gradient / norm.square(), 0).to(acc)[:, None]
    weighted = q * b
    da = (weighted.T @ b) @ a * scale
    db = b @ (a @ a.T) * scale
    for rows, w in _blocks(weight, acc):
        da.addmm_(weighted[rows].T, w)
        db[rows].addmm_(w, a.T)
    return da.mul_(-scale).to(lora_a.dtype), db.mul_(q).mul_(-scale).to(lora_b.dtype)


def row_blocks(matrix: Tensor, acc: torch.dtype) -> Iterator[slice]:
    """Slices of the rows of `matrix` for passes in `acc`: on CPU a conversion makes a copy, which should stay in cache.

    All rows at once where nothing must be converted, which is fastest there. A tensor subclass (a quantised weight) is
    converted by any operation on it.
    """
    on_cpu = matrix.device.type == "cpu"
    if matrix.dtype == acc and on_cpu and type(matrix) in (Tensor, Parameter):
        yield slice(None)
        return
    step = max(1, (CPU_BLOCK if on_cpu else DEVICE_BLOCK) // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        yield slice(start, start + step)


def _base_square(weight: Tensor, acc: torch.dtype) -> Tensor:
    square = torch.empty(len(weight), dtype=acc)
    for rows, w in _blocks(weight, acc):
        torch.linalg.vector_norm(w, dim=1, out=square[rows])
    return square.square_()


def formed_norm(whole: Tensor) -> Tensor:
    """The norm of each row of ``W + s B A (out, in)``, with the bits that `row_norm` gives where B is zero."""
    norm = torch.linalg.vector_norm(whole, dim=1)
    return norm if whole.numel() <= SMALL else norm.square_().sqrt_()


def _direct(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.linalg.vector_norm(torch.addmm(weight, b, a, alpha=scale), dim=1)


def _blocks(weight: Tensor, acc: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Row blocks of `weight` in `acc`."""
    for rows in row_blocks(weight, acc):
        yield rows, weight[rows].to(acc)
