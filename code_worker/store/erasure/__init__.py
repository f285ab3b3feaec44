"""Rows of what must be forgotten: scopes, receipts, and what finds the rest."""
