"""What leaves the server each round, its state between rounds, and a log of releases that a lost round repeats."""

from fedsim.release.log import Kept, ReleaseLog, ReleasesLost
from fedsim.release.release import CLIP_NORM, NOISE, Release, under

__all__ = ["CLIP_NORM", "NOISE", "Kept", "Release", "ReleaseLog", "ReleasesLost", "under"]
