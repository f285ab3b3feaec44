"""The built-in heads: linear, kNN and one-class SVM, registered through the hook as anybody's are."""

from __future__ import annotations

from code_worker.heads import HeadSpec
from code_worker.hookspecs import hookimpl


@hookimpl
def code_worker_register_heads() -> list[HeadSpec]:
    """The three published heads; each is imported when it is used."""
    return [
        HeadSpec("linear", "code_worker_heads.linear:LinearHead", "logistic regression; score = P(generated)"),
        HeadSpec("knn", "code_worker_heads.knn:NearestNeighbourHead", "exact nearest neighbour by cosine distance"),
        HeadSpec("svm", "code_worker_heads.svm:OneClassSvmHead", "one-class SVM, fitted on real images only"),
    ]
