"""One worker process that judges: sources, releases, batches, and how their outcome gets into the ledger."""
