"""The methods: one published method, one final class, one file. `METHODS` is the whole registry."""

from peftlite.adapter import AdapterLinear
from peftlite.methods.adalora import AdaLoRA as AdaLoRA
from peftlite.methods.adalora import AdaLoRALinear as AdaLoRALinear
from peftlite.methods.dora import DoRALinear as DoRALinear
from peftlite.methods.dylora import DyLoRA as DyLoRA
from peftlite.methods.dylora import DyLoRALinear as DyLoRALinear
from peftlite.methods.lora import LoRALinear as LoRALinear

METHODS: dict[str, type[AdapterLinear]] = {
    cls.method: cls
    for cls in (
        LoRALinear,
        DoRALinear,
        AdaLoRALinear,
        DyLoRALinear,
    )
}
