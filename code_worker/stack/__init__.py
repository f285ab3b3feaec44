"""The processes of an installation: worker, trainer and scheduler under a supervisor, and the embedded broker."""
