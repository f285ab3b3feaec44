"""The head `knn-faiss`: nearest neighbours by an HNSW graph, for references by the million."""

from __future__ import annotations

from code_worker import HeadSpec, hookimpl

__all__ = ["code_worker_register_heads"]


@hookimpl
def code_worker_register_heads() -> list[HeadSpec]:
    """Offers the head; faiss is imported when it is used."""
    return [
        HeadSpec("knn-faiss", "code_worker_faiss.head:HnswHead", "approximate nearest neighbour, recall measured")
    ]
