"""The command line, one file per noun; logic lives elsewhere."""
