"""What counts say: of skew, caches and rates, for a report and while training."""
