"""The root of the repository on the path, so that the audit's drivers can be imported from any folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
