"""Data sets in every published form: one labelled image at a time."""
