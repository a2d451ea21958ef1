"""Users and their examples: sources, ingest, the user store, contribution bounding."""
