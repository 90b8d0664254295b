"""Quantised bases: frozen weights in NF4 or int8 under adapters of every method (QLoRA)."""

from peftlite.quantization.blockwise import Format as Format
from peftlite.quantization.linear import PackedWeight as PackedWeight
from peftlite.quantization.linear import QuantizedLinear as QuantizedLinear
