"""What leaves the server each round, its state between rounds, and a log of releases that a lost round repeats."""

from fedsim.release.by_coordinate import CoordinateNoise, why_whole
from fedsim.release.log import CHAIN, LEFT, Chain, Kept, ReleaseLog, ReleasesLost
from fedsim.release.norms import norms_of_length, release_norms
from fedsim.release.release import CLIP_NORM, NOISE, Release, under

__all__ = [
    "CHAIN",
    "CLIP_NORM",
    "LEFT",
    "NOISE",
    "Chain",
    "CoordinateNoise",
    "Kept",
    "Release",
    "ReleaseLog",
    "ReleasesLost",
    "norms_of_length",
    "release_norms",
    "under",
    "why_whole",
]
