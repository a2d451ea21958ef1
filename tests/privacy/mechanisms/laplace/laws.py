"""Laws of the inverse scale that several tests use: each family, and mixtures."""

GAMMA = (("gamma", 1.0, 3.0, 0.2),)
LAWS = {
    "gamma": GAMMA,
    "exponential": (("exponential", 1.0, 2.0, 0.0),),
    "uniform": (("uniform", 1.0, 0.1, 1.0),),
    "truncated-normal": (("truncated-normal", 1.0, 0.5, 0.3),),
    "point": (("point", 1.0, 0.8, 0.0),),
    "mixture": (("gamma", 0.6, 3.0, 0.2), ("uniform", 0.3, 0.1, 1.0), ("truncated-normal", 0.1, -0.2, 0.4)),
}
