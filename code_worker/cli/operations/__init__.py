"""Commands of an installation: database, processes, plugins, checks, audit."""
