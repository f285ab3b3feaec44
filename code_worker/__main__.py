"""`python -m code_worker` is `code-worker`."""

from __future__ import annotations

from code_worker.cli.main import main

if __name__ == "__main__":
    main()
