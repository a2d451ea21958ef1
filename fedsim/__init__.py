"""Fine-tuning language models with user-level differential privacy, in federated-style simulation."""

__version__ = "0.1.0"
