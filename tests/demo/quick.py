"""The demonstration with a retrain of one epoch instead of three, for tests: `python -m tests.demo.quick …`."""

from __future__ import annotations

import sys
from typing import cast

from code_worker.cli.main import main
from code_worker.demo import second_act

if __name__ == "__main__":
    cast("dict[str, str]", second_act.SETTINGS)["CODE_WORKER_TRAINING__EPOCHS"] = "1"
    sys.argv[1:1] = ["demo"]
    main()
