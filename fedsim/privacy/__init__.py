"""User-level privacy: events, the certified accountant, calibration, mechanisms and ledger. Needs numpy and scipy.

Importing it registers the project's mechanisms, with their events and the dominating pairs of these.
"""

import fedsim.privacy.mechanisms  # noqa: F401
