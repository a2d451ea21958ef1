"""A table that others can submit to: `python -m benchmarks.leaderboard check|enter|table|reproduce|task`.

User-level private fine-tuning with certified ε, every row of a task on the same text, base model, δ and test users.
docs/leaderboard.md is the table, and says what an entry is.
"""
