"""User-level privacy: events, the certified accountant, calibration, ledger and statement. Needs numpy and scipy."""
