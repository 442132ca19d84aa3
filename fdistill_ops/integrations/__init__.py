"""Drop-ins for public distillation code bases.

One module for each: :mod:`~fdistill_ops.integrations.fastgen`, :mod:`~fdistill_ops.integrations.dmd2`,
:mod:`~fdistill_ops.integrations.causvid`, :mod:`~fdistill_ops.integrations.self_forcing`,
:mod:`~fdistill_ops.integrations.sid` and :mod:`~fdistill_ops.integrations.fastvideo`. Each has functions in that code
base's own signatures, ``patch()``, which swaps them in (as a context manager, for the length of a block), and
``unpatch()``. docs/integration.md says what changes.
"""

from . import causvid, dmd2, fastgen, fastvideo, self_forcing, sid
from ._deferred import Deferred
from ._fingerprint import fingerprint
from ._patching import Finding, Patch, Patched, Target

__all__ = [
    "Deferred",
    "Finding",
    "Patch",
    "Patched",
    "Target",
    "causvid",
    "dmd2",
    "fastgen",
    "fastvideo",
    "fingerprint",
    "self_forcing",
    "sid",
]
