"""Judging: jobs in, verdicts out, with no broker and no database."""
