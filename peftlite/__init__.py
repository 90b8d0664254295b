"""Parameter-efficient fine-tuning for any ``torch.nn.Module``."""

from peftlite._version import __version__ as __version__
