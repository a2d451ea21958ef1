"""The Flower ServerApp: round loop, dispatch, release, optimizer, checkpoints."""
