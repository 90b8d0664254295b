"""The codes of quantised weights: tables of levels in [-1, 1], and the nearest level of a number."""

import functools

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

# Normalised quantiles of N(0, 1), eight above zero and seven below, with an exact zero (Dettmers et al. 2023,
# arXiv:2305.14314, appendix E); `tests/test_quantization.py` derives them.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def _dynamic() -> Tensor:
    """Sign, decade and linear fraction (Dettmers et al. 2022, arXiv:2110.02861): ``2^i`` levels in the i-th of 7 decades."""
    levels = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        means = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        levels += [means, -means]
    return torch.cat(levels).sort().values


def _fp8_e4m3() -> Tensor:
    """The finite values of an 8-bit float with 4 bits of exponent and 3 of mantissa, over the largest of them, 448."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return values[values.isfinite()].unique() / 448


def _int8() -> Tensor:
    """``k / 127`` for k from -127 to 127."""
    return torch.arange(-127, 128) / 127


BITS = {"nf4": 4, "int8": 8, "dynamic": 8, "fp8_e4m3": 8}
_TABLES = {"nf4": lambda: torch.tensor(NF4), "int8": _int8, "dynamic": _dynamic, "fp8_e4m3": _fp8_e4m3}


@functools.cache
@torch.inference_mode(False)
@unset_fake_temporarily()
def levels(code: str, device: torch.device | str = "cpu") -> Tensor:
    """The levels of `code` in fp32, ascending: 16 for ``"nf4"``, up to 256 for the others.

    Example:
        >>> levels("nf4")[[0, 7, 15]].tolist()
        [-1.0, 0.0, 1.0]
    """
    with torch.device("cpu"):
        return _TABLES[code]().to(device)


@functools.cache
@torch.inference_mode(False)
@unset_fake_temporarily()
def decoding_table(code: str, device: torch.device | str = "cpu") -> Tensor:
    """What a byte stands for: ``(256, 2)`` for a code of 4 bits, the high half first; ``(levels, 1)`` for one of 8 bits."""
    table = levels(code, "cpu")
    if BITS[code] == 8:
        return table[:, None].to(device)
    byte = torch.arange(256, device="cpu")
    return torch.stack([table[byte >> 4], table[byte & 15]], dim=1).to(device)


@functools.cache
@torch.inference_mode(False)
@unset_fake_temporarily()
def _thresholds(code: str, device: torch.device | str) -> Tensor:
    table = levels(code, "cpu").double()
    return ((table[:-1] + table[1:]) / 2).float().to(device)


def encode(values: Tensor, code: str) -> Tensor:
    """The index of the level nearest to each of `values`, fp32 in [-1, 1], as uint8; half-way it is the lower one."""
    return torch.bucketize(values, _thresholds(code, values.device), out_int32=True).to(torch.uint8)
