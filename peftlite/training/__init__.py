"""What changes the training step: parameter groups, and controllers that work on any model."""

from peftlite.training.param_groups import param_groups as param_groups
from peftlite.training.step_cache import StepCache as StepCache
