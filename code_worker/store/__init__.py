"""The SQL ledger: the only place that knows tables."""
