"""Does DPO rank better than SFT in 4-bit movie recommendation? What the three scripts share."""
