"""Every table; importing this fills `Base.metadata`."""

from __future__ import annotations

from code_worker.store.models.audit import AuditRow, RemovalRow
from code_worker.store.models.base import Base, UtcDateTime, db_now, db_now_plus, time_plus
from code_worker.store.models.deployed import AliasMoveRow, AliasRow, PolicyRecord, ReleaseRow
from code_worker.store.models.erasing import (
    CopyToDropRow,
    ErasedDigestRow,
    ErasureRow,
    ErasureTargetRow,
    ImageOriginRow,
)
from code_worker.store.models.fleet import DeadLetterRow, LeaseRow, PluginSeenRow, SourcePauseRow, WorkerRow
from code_worker.store.models.learning import (
    GateComparisonRow,
    ImageGroupRow,
    ImportedRow,
    KeptImageRow,
    LabelRow,
    RunMetricsRow,
    RunRow,
    ScheduleSlotRow,
    SecretRow,
    ShadowScoreRow,
    SnapshotRow,
)
from code_worker.store.models.ledger import EmbeddingRow, JobRow, VerdictRow

__all__ = [
    "AliasMoveRow",
    "AliasRow",
    "AuditRow",
    "Base",
    "CopyToDropRow",
    "DeadLetterRow",
    "EmbeddingRow",
    "ErasedDigestRow",
    "ErasureRow",
    "ErasureTargetRow",
    "GateComparisonRow",
    "ImageGroupRow",
    "ImageOriginRow",
    "ImportedRow",
    "JobRow",
    "KeptImageRow",
    "LabelRow",
    "LeaseRow",
    "PluginSeenRow",
    "PolicyRecord",
    "ReleaseRow",
    "RemovalRow",
    "RunMetricsRow",
    "RunRow",
    "ScheduleSlotRow",
    "SecretRow",
    "ShadowScoreRow",
    "SnapshotRow",
    "SourcePauseRow",
    "UtcDateTime",
    "VerdictRow",
    "WorkerRow",
    "db_now",
    "db_now_plus",
    "time_plus",
]
