"""Lies here so that pytest puts this folder on the import path: tests of every room share mock_clients.py."""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
