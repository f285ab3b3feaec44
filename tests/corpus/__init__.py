"""Bad input of every kind, made on the spot from seeds; `expected.txt` says how each of it must end."""
