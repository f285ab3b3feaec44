"""What is deployed as one: encoder, heads, preprocessing, thresholds, with a manifest of hashes."""
