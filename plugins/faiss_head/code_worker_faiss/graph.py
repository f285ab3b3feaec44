"""One class of references as an HNSW graph over unit vectors (Malkov and Yashunin, 2018), searched through faiss."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Self

import faiss
import numpy as np
from numpy.typing import NDArray

from code_worker.errors import ArtifactError
from code_worker.types import EMBEDDING_DIM
from code_worker_heads.search import unit_rows

__all__ = ["GraphIndex"]

_BLOCK: Final = 65536
_FURTHEST: Final = 2.0


class GraphIndex:
    """References in the order in which they were added; neighbours are found by the graph, distances in float64."""

    def __init__(self, index: Any) -> None:
        self._index = index

    @classmethod
    def empty(cls, links: int, ef_construction: int) -> Self:
        """A graph without references, each of which will have `links` links, twice as many on the lowest level."""
        index = faiss.IndexHNSWFlat(EMBEDDING_DIM, links, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = ef_construction
        return cls(index)

    @classmethod
    def from_bytes(cls, data: NDArray[np.uint8]) -> Self:
        """The graph that `to_bytes` wrote.

        Raises:
            ArtifactError: the bytes are not such a graph.
        """
        try:
            index = faiss.deserialize_index(data)
        except RuntimeError as error:
            raise ArtifactError(f"the graph cannot be read: {error}") from error
        form = (type(index), index.d, index.metric_type)
        if form != (faiss.IndexHNSWFlat, EMBEDDING_DIM, faiss.METRIC_INNER_PRODUCT):
            raise ArtifactError(f"the graph must be HNSW over inner products of {EMBEDDING_DIM} numbers, not {form}")
        return cls(index)

    def to_bytes(self) -> NDArray[np.uint8]:
        """The graph in faiss's own format, `(bytes,) uint8`."""
        return np.asarray(faiss.serialize_index(self._index), dtype=np.uint8)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def add(self, references: NDArray[Any], threads: int) -> None:
        """Adds references `(n, 192)`; with one thread the same references always give the same graph."""
        # OpenMP's number of threads belongs to the thread that sets it: a thread of its own leaves ours alone.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(faiss.omp_set_num_threads, threads).result()
            for start in range(0, len(references), _BLOCK):
                units = unit_rows(references[start : start + _BLOCK]).astype(np.float32)
                pool.submit(self._index.add, units).result()

    def look_at(self, ef_search: int) -> None:
        """Sets how many references a search keeps in view: more find more of the neighbours, and take longer."""
        self._index.hnsw.efSearch = ef_search

    def nearest(self, queries: NDArray[np.float64], k: int) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        """Distances and positions of `k` near references, each `(n, k)`, nearest first, ties by position.

        A neighbour that the graph does not lead to counts as the first reference at the largest distance there is.

        Args:
            queries: `(n, 192) float64`, of length 1.
            k: 1 to the number of references.
        """
        if len(queries) == 0:
            return np.empty((0, k)), np.empty((0, k), dtype=np.intp)
        _, found = self._index.search(queries.astype(np.float32), k)
        reached = found >= 0
        positions = np.where(reached, found, 0).astype(np.intp)
        vectors = unit_rows(self._index.reconstruct_batch(positions.ravel())).reshape(*positions.shape, -1)
        distances = (1.0 - np.vecdot(vectors, queries[:, None])).clip(0.0, _FURTHEST)
        distances[~reached] = _FURTHEST
        order = np.lexsort((positions, distances), axis=1)
        return np.take_along_axis(distances, order, axis=1), np.take_along_axis(positions, order, axis=1)
