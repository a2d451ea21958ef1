"""The Flower ClientApp: units' updates, clipped and summed."""
