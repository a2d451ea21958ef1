"""The same fine-tuning with what else a user would take: `python -m benchmarks.peers NAME`, then `… table`.

Every library trains the same model on the same rows of the same users for about as many gradient evaluations, as its
own documentation shows, in an environment of its own, and leaves its weights and a report of the sampling and the
noise that it really used. From these, here, in one process and by one piece of code: held-out losses, and the
user-level ε that can be certified for that mechanism. docs/peers.md says of each what it samples, clips and assumes.
"""
