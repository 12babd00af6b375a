"""nxfx's passes, one file each.

``DEFAULT_ORDER`` is the default pipeline: writes become masks first (the casts and indices they hold are then ordinary nodes),
integers stay integers until it is safe to round, complex numbers become real ones, 64-bit values are narrowed, what is left of value
dependence is reported, masks become finite once every cast is where it stays, and last of all what the compiler would refuse.
"""

from nxfx.passes.check_constraints import CheckConstraints
from nxfx.passes.complex_to_real import ComplexToReal
from nxfx.passes.exact_integer_sums import ExactIntegerSums
from nxfx.passes.finite_masks import FiniteMasks
from nxfx.passes.flag_value_dependence import FlagValueDependence
from nxfx.passes.lift_int_casts import LiftIntCasts
from nxfx.passes.mask_slice_writes import MaskSliceWrites
from nxfx.passes.narrow_64bit import Narrow64bit

DEFAULT_ORDER = (
    MaskSliceWrites, LiftIntCasts, ComplexToReal, Narrow64bit, ExactIntegerSums, FlagValueDependence, FiniteMasks, CheckConstraints,
)  # fmt: skip
