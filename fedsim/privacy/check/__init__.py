"""A second method for ε, which shares no code with the accountant: it confirms bounds, and certifies none.

It knows events, and derives their privacy losses from what they mean.
"""

from fedsim.privacy.check import allocation_law, laplace_law  # noqa: F401
from fedsim.privacy.check.confirmation import BoundCheck, Confirmation, Verdict, charged, confirm, counted
from fedsim.privacy.check.loss_laws import NotCheckable

__all__ = ["BoundCheck", "Confirmation", "NotCheckable", "Verdict", "charged", "confirm", "counted"]
