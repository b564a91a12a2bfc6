"""RMSprop of TensorFlow r2.0 for NumPy and CuPy arrays: fused, sparse-aware, the same bits everywhere."""

from gpurms import dialects as dialects
from gpurms import schedules as schedules
from gpurms.backend import array_module as array_module
from gpurms.rmsprop import RMSprop as RMSprop
from gpurms.tape import GradientTape as GradientTape
from gpurms.tape import gather as gather
from gpurms.variable import IndexedSlices as IndexedSlices
from gpurms.variable import Variable as Variable

__version__ = "0.1.0"
