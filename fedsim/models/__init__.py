"""Models: load, adapt, pre-train, evaluate, export.

Importing this package costs nothing; its parts import torch and transformers when they are asked for.
"""
