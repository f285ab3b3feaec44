"""How good a release is: measured, compared with another, and shown."""
