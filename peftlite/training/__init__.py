"""What changes the training step: parameter groups, and controllers that work on any model."""

from peftlite.training.param_groups import param_groups as param_groups
from peftlite.training.suggest_lr import suggest_lr as suggest_lr
