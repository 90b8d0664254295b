"""What changes the training step: parameter groups, and controllers that work on any model.

Methods import `training.controller`, and with it this package: nothing in it may import `peftlite.inject` or the
package `peftlite.methods` (single modules of it may be imported).
"""

from peftlite.training.controller import Controller as Controller
from peftlite.training.lisa import LISA as LISA
from peftlite.training.offload import OffloadedAdamW as OffloadedAdamW
from peftlite.training.param_groups import param_groups as param_groups
from peftlite.training.reflora import RefLoRA as RefLoRA
from peftlite.training.step_cache import StepCache as StepCache
from peftlite.training.suggest_lr import suggest_lr as suggest_lr
