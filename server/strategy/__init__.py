"""User-level DP for apps of stock Flower."""

from server.strategy.user_level_dp import UserLevelDP

__all__ = ["UserLevelDP"]
