"""Look at an adapted model."""

from peftlite.analysis.intervention import ScaledMatrix as ScaledMatrix
from peftlite.analysis.intervention import scale_intruders as scale_intruders
from peftlite.analysis.intruders import IntruderReport as IntruderReport
from peftlite.analysis.intruders import MatrixReport as MatrixReport
from peftlite.analysis.intruders import intruder_report as intruder_report
from peftlite.analysis.memory import MemoryEstimate as MemoryEstimate
from peftlite.analysis.memory import estimate_memory as estimate_memory
from peftlite.analysis.step import StepCost as StepCost
from peftlite.analysis.step import StepReport as StepReport
from peftlite.analysis.step import benchmark_step as benchmark_step
from peftlite.analysis.summary import Summary as Summary
from peftlite.analysis.summary import summary as summary
from peftlite.analysis.timeline import PhaseMemory as PhaseMemory
