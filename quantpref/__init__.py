"""Does DPO rank better than SFT in 4-bit movie recommendation? What the three scripts share."""

import os

# Before any library reads it: they report usage to their makers otherwise, and nobody was asked.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
