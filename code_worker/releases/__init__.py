"""Releases: encoder, heads, preprocessing and thresholds deployed as one, with a manifest of hashes."""
