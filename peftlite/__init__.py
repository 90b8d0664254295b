"""Parameter-efficient fine-tuning for any ``torch.nn.Module``: adapters of the LoRA family under one contract."""

from peftlite._version import __version__ as __version__
from peftlite.adapter import AdapterLinear as AdapterLinear
from peftlite.analysis import summary as summary
from peftlite.checkpoint import load_adapters as load_adapters
from peftlite.checkpoint import save_adapters as save_adapters
from peftlite.inject import adapters as adapters
from peftlite.inject import disable_adapters as disable_adapters
from peftlite.inject import inject_adapters as inject_adapters
from peftlite.inject import remove_adapters as remove_adapters
from peftlite.merge import merge_adapters as merge_adapters
from peftlite.merge import merged as merged
from peftlite.methods import METHODS as METHODS
from peftlite.methods import DoRALinear as DoRALinear
from peftlite.methods import LoRALinear as LoRALinear
from peftlite.quantization import QuantizedLinear as QuantizedLinear
from peftlite.quantize import dequantize_base as dequantize_base
from peftlite.quantize import quantize_base as quantize_base
from peftlite.targets import find_targets as find_targets
from peftlite.training import OffloadedAdamW as OffloadedAdamW
from peftlite.training import param_groups as param_groups
