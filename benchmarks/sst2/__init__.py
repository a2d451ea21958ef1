"""EW-Tune, ANADP and LMO-DP on the task that their papers report, SST-2."""
