"""The real store of these tests comes out of a real gate: `staging` is with the system tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "system"))
