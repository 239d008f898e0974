"""`moe-a2a bench`: correctness first, then time, with baselines in the same run."""
