"""What importing costs: the producer's side loads no model code, in an interpreter that has seen nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.servers import free_port

HEAVY = (
    "PIL",
    "boto3",
    "botocore",
    "joblib",
    "numpy",
    "safetensors",
    "scipy",
    "sklearn",
    "timm",
    "torch",
    "torchvision",
)
REPORT = "import sys; print('modules:', *sorted({name.partition('.')[0] for name in sys.modules}))"


def modules_after(statement: str) -> set[str]:
    """Top-level modules loaded in a clean interpreter by the statement."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{statement}\n{REPORT}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("modules: ")[2].split())


def test_light_imports_load_no_model_code() -> None:
    statements = (
        "import code_worker",
        "import code_worker; code_worker.Head; code_worker.HeadSpec; code_worker.hookimpl",
        "import code_worker; code_worker.Job; code_worker.Verdict; code_worker.RejectReason",
        "import code_worker.errors, code_worker.types, code_worker.settings, code_worker.logs, code_worker.wire",
        "import code_worker; code_worker.enqueue; code_worker.enqueue_many; code_worker.verdict; code_worker.label",
        "import code_worker.client, code_worker.publisher, code_worker.broker",
        "import code_worker; code_worker.install; code_worker.create_app",
        "import code_worker.cli.main",
    )
    # One after the other in one interpreter: what all of them together do not load, none does.
    checks = [f"{each}\nassert not {set(HEAVY)} & sys.modules.keys(), {each!r}" for each in statements]
    assert modules_after("import sys\n" + "\n".join(checks)).isdisjoint(HEAVY)


def test_an_enqueue_loads_no_model_code(tmp_path: Path) -> None:
    code = f"""
from code_worker.client import Client
from code_worker.settings import Settings
from code_worker.store import migrate
from code_worker.store.engine import open_store
settings = Settings(data_dir={str(tmp_path)!r}, broker_url="redis://127.0.0.1:{free_port()}/0")
migrate.upgrade(open_store(settings.resolved_database_url))
client = Client(settings)
job = client.enqueue("s3://uploads/a.jpg")
assert client.verdict(job) is None
client.close()
"""
    assert modules_after(code).isdisjoint(HEAVY)


def test_importing_the_package_alone_loads_neither_celery_nor_sqlalchemy() -> None:
    assert modules_after("import code_worker, code_worker.celery").isdisjoint(
        {"celery", "kombu", "sqlalchemy", "redis", "pydantic", "click"}
    )


def test_an_app_that_we_are_installed_in_loads_no_database_library_before_it_is_needed(tmp_path: Path) -> None:
    code = f"""
import celery, code_worker
from code_worker.settings import Settings
app = celery.Celery("theirs", broker="redis://127.0.0.1:{free_port()}/0")
code_worker.install(app, Settings(data_dir={str(tmp_path)!r}, schedule={{"retrain": "0 3 * * sun"}}))
app.finalize()
assert "code_worker.moderate" in app.tasks and app.conf.task_routes
"""
    assert modules_after(code).isdisjoint({*HEAVY, "sqlalchemy", "alembic", "psycopg", "redbeat"})


def test_a_heavy_import_would_be_noticed() -> None:
    assert "numpy" in modules_after("import numpy")


def test_what_judges_loads_no_training_library() -> None:
    parts = ("encoder.engines", "encoder.loop", "encoder.weights", "releases.loading", "worker.judging.node")
    loaded = modules_after("\n".join(f"import code_worker.{part}" for part in parts))
    training = {"timm", "torchvision", "transformers", "sklearn", "scipy", "matplotlib", "tensorboard"}
    assert loaded.isdisjoint(training | {"huggingface_hub"})
