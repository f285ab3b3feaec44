"""The CoDE encoder: crops in, 192 numbers each out."""
