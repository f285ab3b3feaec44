"""Settings: environment `CODE_WORKER_…` (nested by `__`) over an optional TOML file over defaults."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from code_worker.errors import ConfigurationError
from code_worker.settings.addresses import broker_address, database_address
from code_worker.settings.configuration import Layer, expected, layers
from code_worker.settings.sections import (
    DAY_S,
    MANY_THREADS,
    YEAR_S,
    FileSettings,
    GateSettings,
    LabelSettings,
    LimitSettings,
    S3Settings,
    ScheduleSettings,
    Section,
    ShadowSettings,
    TrainingSettings,
)
from code_worker.system.files import expanded, forbidden, no_file

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

__all__ = [
    "BrokerSettings",
    "FileSettings",
    "GateSettings",
    "LabelSettings",
    "LimitSettings",
    "RetentionSettings",
    "RoleSettings",
    "S3Settings",
    "ScheduleSettings",
    "Settings",
    "ShadowSettings",
    "TrainingSettings",
    "WorkerSettings",
    "load_settings",
]


_KEY_LENGTH = 32
_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,4})?")
_LONGEST_DAYS = 18_250
"""Fifty years: ids carry times from 1970 on."""
_BELOW: ContextVar[Mapping[str, object]] = ContextVar("_BELOW", default={})  # noqa: B039 - nobody writes to it
"""What `load_settings` was given to count below the environment and the file."""


class BrokerSettings(Section):
    """Settings of the broker."""

    key_prefix: str | None = Field(
        "cw:",
        description="Prefix of every key in Redis, for ACLs and shared servers; `null`: none, as in an app of yours "
        "that sets no `global_keyprefix`.",
    )
    visibility_timeout_s: int = Field(
        600,
        ge=30,
        le=YEAR_S,
        description="After this an unacknowledged message is delivered again; at least 4 longest batches.",
    )
    socket_timeout_s: float = Field(10.0, gt=0, le=DAY_S, description="A half-open connection is noticed after this.")
    allow_insecure: bool = Field(
        False, description="Allow a broker that is neither local nor protected by a password or TLS."
    )


class WorkerSettings(Section):
    """Settings of one worker process."""

    concurrency: int = Field(4, ge=1, le=MANY_THREADS, description="Messages judged at the same time.")
    fetch_threads: int = Field(8, ge=1, le=MANY_THREADS, description="Objects fetched and decoded at the same time.")
    streams: int | None = Field(
        None, ge=1, le=MANY_THREADS, description="Encoder streams; unset: one per core on CPU, two on CUDA."
    )
    micro_batch: int | None = Field(
        None, ge=1, le=65_536, description="Crops per forward pass; unset: 8 on CPU, 256 on CUDA."
    )
    compile: bool | None = Field(
        None,
        description="Fuse and record the encoder's kernels at the start, which takes a minute or two; unset: on "
        "CUDA. What cannot be compiled runs as it is, with a warning. Nothing on a CPU.",
    )
    linger_ms: float = Field(4.0, ge=0, le=60_000, description="How long a stream waits for its micro-batch to fill.")
    lease_s: int = Field(20, ge=5, le=DAY_S, description="A claim lapses after this unless the worker renews it.")
    batch_timeout_s: int = Field(
        120, ge=5, le=DAY_S, description="A batch that makes no step for so long makes the watchdog end the process."
    )
    max_attempts: int = Field(3, ge=1, le=1000, description="Claims that may end in a dead worker before quarantine.")
    max_denied: int | None = Field(
        20,
        ge=1,
        le=1_000_000,
        description="Images of one bucket that are denied in a row, none readable in between, before the bucket is "
        "paused instead; unset (`null`): each is rejected by itself, however many.",
    )
    max_faults: int = Field(
        12, ge=1, le=1000, description="Transient faults before the job is rejected with the last one."
    )
    backoff_s: float = Field(
        2.0, gt=0, le=DAY_S, description="First wait after a transient fault; doubles, jittered."
    )
    backoff_max_s: float = Field(900.0, gt=0, le=30 * DAY_S, description="Longest wait after a transient fault.")
    sweep_interval_s: float = Field(
        5.0, ge=0.01, le=DAY_S, description="How often the sweeper looks for jobs nobody holds."
    )
    release_poll_s: float = Field(
        3.0, ge=0.01, le=DAY_S, description="How often a worker looks whether the champion moved."
    )
    remote_control: Literal["off", "inspect", "all"] = Field(
        "off",
        description="What `celery inspect`, Flower and other monitors may do with our workers: nothing; look at "
        "them; or all that Celery's remote control can, such as ending them. Anyone who reaches the broker may do it "
        "then.",
    )
    store_embeddings: bool = Field(
        True, description="Keep embeddings, so that bytes seen before are not encoded again."
    )


class RetentionSettings(Section):
    """Days for which things are kept; unset: for ever. Appeals and the learning rest on what is kept."""

    jobs_days: float | None = Field(
        None,
        gt=0,
        le=_LONGEST_DAYS,
        description="Finished jobs, with their verdicts and shadow scores, from their last verdict on.",
    )
    superseded_days: float | None = Field(
        None, gt=0, le=_LONGEST_DAYS, description="Verdicts that a newer one of the same job replaced."
    )
    labels_days: float | None = Field(
        None,
        gt=0,
        le=_LONGEST_DAYS,
        description="What was said of an image, and its kept copy, from the last statement on.",
    )
    embeddings_days: float | None = Field(
        90.0,
        gt=0,
        le=_LONGEST_DAYS,
        description="Embeddings of images of which no copy is kept; they are computed again when needed.",
    )
    shadow_days: float | None = Field(90.0, gt=0, le=_LONGEST_DAYS, description="Scores of challengers.")
    dead_letters_days: float | None = Field(
        30.0, gt=0, le=_LONGEST_DAYS, description="Broker messages that nobody could read."
    )
    curves_days: float | None = Field(
        365.0, gt=0, le=_LONGEST_DAYS, description="Curves of training runs; the runs themselves stay."
    )
    slots_days: float | None = Field(365.0, gt=0, le=_LONGEST_DAYS, description="Times at which schedules fired.")
    interval_s: float = Field(600.0, ge=0.01, le=30 * DAY_S, description="How often a worker looks what is too old.")
    batch: int = Field(1000, ge=1, le=10_000, description="Rows deleted in one transaction.")
    pass_s: float = Field(
        30.0, gt=0, le=DAY_S, description="A pass ends after so long, done or not; the next one goes on."
    )


class RoleSettings(Section):
    """Names with roles; while all three are empty, everybody may do everything."""

    labellers: tuple[str, ...] = Field(
        (), description="Who may label: names as `by` or as users of the command line; `*` is everybody."
    )
    reviewers: tuple[str, ...] = Field(
        (),
        description="Who may also import files of labels, label in others' names, and settle contradictions.",
    )
    operators: tuple[str, ...] = Field(
        (), description="Who may also change what judges: releases, policies, retrains, rescoring, erasure."
    )


class Settings(BaseSettings):
    """All settings of the project; every field can be set by environment or file."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
    of_app: ClassVar[Callable[[], Settings] | None] = None
    """Reads those of the app that `install` put our tasks in, for producers in its process."""

    data_dir: Path = Field(Path("~/.local/share/code_worker"), description="Where local state lives.")
    database_url: SecretStr | None = Field(
        None, description="SQLAlchemy URL (`postgresql+psycopg://…`); unset: SQLite in the data directory."
    )
    database_pooler: Literal["transaction"] | None = Field(
        None,
        description="`transaction`: PgBouncer or another pooler is in between, in that mode; unset: none.",
    )
    broker_url: SecretStr | None = Field(
        None, description="Redis URL; unset: the embedded server that `code-worker up` runs in the data directory."
    )
    artifacts: str | None = Field(
        None,
        description="Where releases are kept: a directory or `s3://bucket/prefix`; unset: in the data directory.",
    )
    signing_keys: tuple[SecretStr, ...] = Field(
        (),
        description="Keys (32 characters or more) of the signatures of releases: the first signs what is imported or "
        "trained here, each is accepted, and what none of them signed is refused. Empty: nothing is asked for.",
    )
    datasets: str | None = Field(
        None,
        description="Where copies of labelled images are kept: a directory or `s3://bucket/prefix`; unset: in the "
        "data directory.",
    )
    plugins_dir: Path | None = Field(None, description="Directory of single-file plugins.")
    plugins_allowed: tuple[str, ...] | None = Field(
        None,
        description="Distributions whose plugins are loaded, beside our own; unset: every one that is installed. "
        "Files in `plugins_dir` are allowed by that setting.",
    )
    head: str | None = Field(
        None, description="Head used when neither job, plugin nor policy names one; unset: the release's own default."
    )
    heads: dict[str, dict[str, Any]] = Field(
        {},
        description="Options of heads for the next fit, by head: `[heads.knn]` with `n_neighbors = 5` in "
        "the file, or `CODE_WORKER_HEADS__KNN__N_NEIGHBORS=5`.",
    )
    changed_heads: Literal["refuse", "warn"] = Field(
        "refuse",
        description="A release with a head that no longer scores the release's probes as it did when it was made, as "
        "when its plugin's code changed: `refuse` to load it, or `warn` and judge.",
    )
    device: str = Field("auto", description="`auto`, `cpu`, `cuda` or `cuda:N`.")
    engine: Literal["auto", "torch", "openvino"] = Field(
        "auto", description="What runs the encoder; auto: OpenVINO on a CPU where it is installed, else torch."
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="Encoder arithmetic; fp32 on CPU.")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="auto: console on a terminal, else JSON."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level logged.")
    s3: S3Settings = S3Settings()
    files: FileSettings = FileSettings()
    limits: LimitSettings = Field(default_factory=LimitSettings)
    broker: BrokerSettings = BrokerSettings()
    worker: WorkerSettings = WorkerSettings()
    labels: LabelSettings = LabelSettings()
    training: TrainingSettings = TrainingSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    gate: GateSettings = GateSettings()
    shadow: ShadowSettings = ShadowSettings()
    retention: RetentionSettings = RetentionSettings()
    roles: RoleSettings = RoleSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then environment, then the file of `CODE_WORKER_CONFIG`, then the mapping of the program."""
        written = (InitSettingsSource(settings_cls, layer.values) for layer in layers(settings_cls, _BELOW.get()))
        return (init_settings, *written)

    @field_validator("signing_keys")
    @classmethod
    def _long_enough(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if any(len(key.get_secret_value()) < _KEY_LENGTH for key in keys):
            raise ValueError(f"a key must have {_KEY_LENGTH} characters or more")
        return keys

    @field_validator("device")
    @classmethod
    def _is_device(cls, device: str) -> str:
        if not _DEVICE.fullmatch(device):
            raise ValueError("choose auto, cpu, cuda or cuda:N")
        return device

    @field_validator("broker_url")
    @classmethod
    def _read_broker(cls, url: SecretStr | None) -> SecretStr | None:
        return None if url is None else SecretStr(broker_address(url.get_secret_value()))

    @field_validator("database_url")
    @classmethod
    def _read_database(cls, url: SecretStr | None) -> SecretStr | None:
        return None if url is None else SecretStr(database_address(url.get_secret_value()))

    @property
    def data_path(self) -> Path:
        """The data directory, absolute."""
        return no_file(expanded(self.data_dir, "CODE_WORKER_DATA_DIR"), "CODE_WORKER_DATA_DIR")

    @property
    def resolved_database_url(self) -> str:
        """Database URL in use, password included: never log it."""
        if self.database_url is not None:
            url = self.database_url.get_secret_value()
            if self.database_pooler is None or url.startswith("sqlite") or "pooler=" in url:
                return url
            return f"{url}{'&' if '?' in url else '?'}pooler={self.database_pooler}"
        return f"sqlite:///{self.data_path / 'code_worker.db'}"

    @property
    def database_file(self) -> Path | None:
        """The file of the SQLite database in use; None for another kind, and for a URL that names no file."""
        scheme, _, name = self.resolved_database_url.partition(":///")
        if not scheme.startswith("sqlite") or name in {"", ":memory:"} or "?" in name:
            return None
        return expanded(Path(name), "CODE_WORKER_DATABASE_URL")

    @property
    def resolved_artifacts(self) -> str:
        """Artifact root in use: an absolute directory or an `s3://` prefix."""
        return self._resolved("artifacts", "releases")

    @property
    def resolved_datasets(self) -> str:
        """Dataset storage in use: an absolute directory or an `s3://` prefix."""
        return self._resolved("datasets", "dataset")

    def _resolved(self, setting: Literal["artifacts", "datasets"], otherwise: str) -> str:
        address = self.artifacts if setting == "artifacts" else self.datasets
        if address is None:
            return str(self.data_path / otherwise)
        if address.startswith("s3://"):
            return address.rstrip("/")
        return str(expanded(Path(address), f"CODE_WORKER_{setting.upper()}"))

    @property
    def resolved_broker_url(self) -> str:
        """Broker URL in use, password included: never log it.

        Raises:
            ConfigurationError: none is set and no embedded server runs in the data directory.
        """
        if self.broker_url is not None:
            return self.broker_url.get_secret_value()
        address = self.data_path / "run" / "broker.url"
        try:
            return address.read_text(encoding="utf-8").strip()
        except PermissionError:
            raise ConfigurationError(forbidden(address)) from None
        except OSError:
            raise ConfigurationError(
                "no broker: set CODE_WORKER_BROKER_URL (in your own Celery app, to its broker_url), "
                f"or start `code-worker up` for {self.data_path}"
            ) from None


def load_settings(*, below: Mapping[str, object] | None = None, **overrides: object) -> Settings:
    """Reads the settings once; callers pass them on.

    Args:
        below: Settings of the program that asks (`app.conf.code_worker`), sections as nested mappings; environment
            and file count before them.
        overrides: Settings that count before everything else.

    Raises:
        ConfigurationError: names each wrong setting and where it stands; values are never shown, they may be secrets.
    """
    token = _BELOW.set({} if below is None else below)
    try:
        return Settings(**overrides)  # type: ignore[arg-type]  # values are checked by pydantic
    except ValidationError as error:
        written = layers(Settings, _BELOW.get())
        problems = dict.fromkeys(_described(problem, written, overrides) for problem in error.errors())
        raise ConfigurationError(f"wrong settings: {'; '.join(problems)}") from None
    finally:
        _BELOW.reset(token)


def _described(problem: ErrorDetails, written: Sequence[Layer], overrides: Mapping[str, object]) -> str:
    """Returns which setting is wrong, where it stands, and what is expected there."""
    names = tuple(str(part) for part in problem["loc"] if not isinstance(part, int))
    layer = None if names[0] in overrides else next((each for each in written if each.holds(names)), None)
    place = ".".join(names) if layer is None else layer.place(names)
    said = None if problem["type"] == "value_error" else expected(Settings, names, problem["type"])
    return f"{place}: {said or problem['msg'].removeprefix('Value error, ')}"
