"""What leaves the server each round, its state between rounds, and a log of releases that a lost round repeats."""

from fedsim.release.log import CHAIN, LEFT, Chain, Kept, ReleaseLog, ReleasesLost
from fedsim.release.norms import release_norms
from fedsim.release.release import CLIP_NORM, NOISE, Release, under

__all__ = [
    "CHAIN",
    "CLIP_NORM",
    "LEFT",
    "NOISE",
    "Chain",
    "Kept",
    "Release",
    "ReleaseLog",
    "ReleasesLost",
    "release_norms",
    "under",
]
