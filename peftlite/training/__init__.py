"""What changes the training step: parameter groups, and controllers that work on any model."""

from peftlite.training.offload import OffloadedAdamW as OffloadedAdamW
from peftlite.training.param_groups import param_groups as param_groups
