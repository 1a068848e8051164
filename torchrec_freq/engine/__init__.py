"""A batch of ids through one TBE: lookups, counters, totals, the update in FBGEMM's backward."""
