"""The command line, as the tests of its commands have it."""

from tests.cli.conftest import bare_cli, cli, sqlite_cli

__all__ = ["bare_cli", "cli", "sqlite_cli"]
