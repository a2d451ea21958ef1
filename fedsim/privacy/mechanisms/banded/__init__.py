"""Banded noise: noise of one round that takes back part of the noise of the rounds before."""
