"""Running experiments: one point, its ledger, latency, and the tables made of several points."""
