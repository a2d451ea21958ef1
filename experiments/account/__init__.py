"""`account`: ε of a plan, or the parameter that meets a target ε."""
