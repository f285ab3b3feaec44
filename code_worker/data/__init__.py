"""Images to learn from and to measure on: labels, kept copies, and data sets in every published form."""
