"""Attacks on plans and on finished runs, and the lower bounds on ε that they give."""
