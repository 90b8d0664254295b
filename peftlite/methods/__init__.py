"""The methods: one published method, one final class, one file. `METHODS` is the whole registry."""

from peftlite.adapter import AdapterLinear
from peftlite.methods.adalora import AdaLoRA as AdaLoRA
from peftlite.methods.adalora import AdaLoRALinear as AdaLoRALinear
from peftlite.methods.dora import DoRALinear as DoRALinear
from peftlite.methods.dylora import DyLoRA as DyLoRA
from peftlite.methods.dylora import DyLoRALinear as DyLoRALinear
from peftlite.methods.lora import LoRALinear as LoRALinear
from peftlite.methods.sharelora import ShareLoRALinear as ShareLoRALinear
from peftlite.methods.tied_lora import TiedLoRALinear as TiedLoRALinear
from peftlite.methods.vera import VeRALinear as VeRALinear

METHODS: dict[str, type[AdapterLinear]] = {
    cls.method: cls
    for cls in (
        LoRALinear,
        DoRALinear,
        VeRALinear,
        TiedLoRALinear,
        ShareLoRALinear,
        AdaLoRALinear,
        DyLoRALinear,
    )
}
