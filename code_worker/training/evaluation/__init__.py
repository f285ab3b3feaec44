"""Evaluation of releases: measured, compared with another, and shown."""
