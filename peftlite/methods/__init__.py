"""The methods: one published method, one final class, one file. `METHODS` is the whole registry."""

from peftlite.adapter import AdapterLinear
from peftlite.methods.adalora import AdaLoRA as AdaLoRA
from peftlite.methods.adalora import AdaLoRALinear as AdaLoRALinear
from peftlite.methods.dora import DoRALinear as DoRALinear
from peftlite.methods.dylora import DyLoRA as DyLoRA
from peftlite.methods.dylora import DyLoRALinear as DyLoRALinear
from peftlite.methods.ia3 import IA3Linear as IA3Linear
from peftlite.methods.loha import LoHaLinear as LoHaLinear
from peftlite.methods.lokr import LoKrLinear as LoKrLinear
from peftlite.methods.lora import LoRALinear as LoRALinear
from peftlite.methods.lora_fa import LoRAFALinear as LoRAFALinear
from peftlite.methods.melora import MELoRALinear as MELoRALinear
from peftlite.methods.olora import OLoRALinear as OLoRALinear
from peftlite.methods.paca import PaCALinear as PaCALinear
from peftlite.methods.pissa import PiSSALinear as PiSSALinear
from peftlite.methods.sdlora import SDLoRALinear as SDLoRALinear
from peftlite.methods.sharelora import ShareLoRALinear as ShareLoRALinear
from peftlite.methods.tied_lora import TiedLoRALinear as TiedLoRALinear
from peftlite.methods.tt_lora import TTLoRALinear as TTLoRALinear
from peftlite.methods.vera import VeRALinear as VeRALinear
from peftlite.methods.xgblora import XGBLoRA as XGBLoRA
from peftlite.methods.xgblora import XGBLoRALinear as XGBLoRALinear

METHODS: dict[str, type[AdapterLinear]] = {
    cls.method: cls
    for cls in (
        LoRALinear,
        DoRALinear,
        LoRAFALinear,
        MELoRALinear,
        TTLoRALinear,
        PaCALinear,
        PiSSALinear,
        OLoRALinear,
        IA3Linear,
        SDLoRALinear,
        XGBLoRALinear,
        LoHaLinear,
        LoKrLinear,
        VeRALinear,
        TiedLoRALinear,
        ShareLoRALinear,
        AdaLoRALinear,
        DyLoRALinear,
    )
}
