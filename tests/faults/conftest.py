"""The campaigns of `make faults`; too long for `make test`, and partly for root alone."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
