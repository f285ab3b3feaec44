"""Erasure: everything that is kept of jobs and images goes, and a receipt stays."""
