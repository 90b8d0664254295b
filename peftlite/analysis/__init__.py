"""Look at an adapted model."""

from peftlite.analysis.summary import Summary as Summary
from peftlite.analysis.summary import summary as summary
