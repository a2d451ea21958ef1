"""Logistic regression on points that each node draws for itself."""
