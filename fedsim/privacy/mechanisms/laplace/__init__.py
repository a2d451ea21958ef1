"""Laplace noise of random scale, after LMO-DP: for one number, or sums clipped in L1; of no use for models."""
