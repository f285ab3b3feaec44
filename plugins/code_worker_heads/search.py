"""Exact nearest neighbours by cosine distance: found in float32, decided in float64."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from code_worker.heads import compute_device
from code_worker.logs import get_logger
from code_worker.types import EMBEDDING_DIM
from code_worker_heads.device import DeviceSearch

log = get_logger(__name__)

_QUERIES: Final = 128
_BLOCK: Final = 16384
"""References per matrix product: few large products, since each ends in a barrier of the BLAS threads, and a barrier
costs a time slice where other work wants the cores too."""
_CELL: Final = 128
"""References whose largest similarity is looked at first; only cells that may hold a neighbour are searched."""

_LEAST_ON_A_DEVICE: Final = 20_000
"""References from which on the way to a GPU and back is shorter than the search on a processor."""

_UNIT_ROUNDOFF: Final = 2.0**-24
_ERROR: Final = (EMBEDDING_DIM + 8) * _UNIT_ROUNDOFF
"""Bound of a float32 similarity's error for unit vectors, in any order of summation (Higham 2002, eq. 3.5).

The 8 covers rounding the two vectors to float32 and the comparison itself.
"""
MARGIN: Final = np.float32(2 * _ERROR)
"""Cosine distances that differ by less are the same in float32."""


def unit_rows(rows: NDArray[Any]) -> NDArray[np.float64]:
    """Rows scaled to length 1 in float64; a row of zeros stays, as in scikit-learn, at distance 1 from everything."""
    wide = rows.astype(np.float64)
    lengths = np.sqrt(np.vecdot(wide, wide))
    return wide / np.where(lengths == 0, 1.0, lengths)[:, None]


class NeighbourIndex(Protocol):
    """References of one class that can be searched."""

    def __len__(self) -> int: ...

    def nearest(self, queries: NDArray[np.float64], k: int) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        """Distances and positions of the `k` nearest references, each `(n, k)`, nearest first, ties by position."""


class CosineIndex:
    """References `(n, 192)` of one class, searched by a blocked matrix product.

    Every reference whose float32 similarity comes within the rounding margin of the k-th largest is compared again
    in float64, so the answer does not depend on how the product was cut or rounded.
    """

    def __init__(self, references: NDArray[Any]) -> None:
        self.references = references
        self._units = np.empty(references.shape, dtype=np.float32)
        for start in range(0, len(references), _BLOCK):
            # Block by block, so that the float64 copies that `unit_rows` makes stay small.
            self._units[start : start + _BLOCK] = unit_rows(references[start : start + _BLOCK])
        self._lock = threading.Lock()
        self._device: str | None = None
        self._search: DeviceSearch | None = None

    def __len__(self) -> int:
        return len(self.references)

    def nearest(self, queries: NDArray[np.float64], k: int) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        """Distances and positions of the `k` nearest references, each `(n, k)`, nearest first, ties by position.

        Args:
            queries: `(n, 192) float64`, of length 1.
            k: 1 to the number of references.
        """
        distances = np.empty((len(queries), k))
        positions = np.empty((len(queries), k), dtype=np.intp)
        for start in range(0, len(queries), _QUERIES):
            block = queries[start : start + _QUERIES]
            for row, candidates in enumerate(self._near(block.astype(np.float32), k)):
                exact = self._distances(block[row], candidates)
                chosen = np.lexsort((candidates, exact))[:k]
                distances[start + row], positions[start + row] = exact[chosen], candidates[chosen]
        return distances, positions

    def _distances(self, query: NDArray[np.float64], positions: NDArray[np.intp]) -> NDArray[np.float64]:
        parts = [
            1.0 - np.vecdot(unit_rows(self.references[positions[start : start + _BLOCK]]), query)
            for start in range(0, len(positions), _BLOCK)
        ]
        return np.asarray(np.concatenate(parts).clip(0.0, 2.0))

    def _near(self, queries: NDArray[np.float32], k: int) -> list[NDArray[np.intp]]:
        device = compute_device()
        if device == "cpu" or len(self) < _LEAST_ON_A_DEVICE:
            return self._candidates(queries, k)
        # One thread moves the references; moving them twice would take the device's memory twice.
        with self._lock:
            if self._device != device:
                self._device, self._search = device, self._moved_to(device)
            search = self._search
        return self._candidates(queries, k) if search is None else search.candidates(queries, k, float(MARGIN))

    def _moved_to(self, device: str) -> DeviceSearch | None:
        try:
            return DeviceSearch(self._units, device)
        except RuntimeError as error:
            log.warning("references_stay_on_the_cpu", references=len(self), device=device, error=str(error))
            return None

    def _candidates(self, queries: NDArray[np.float32], k: int) -> list[NDArray[np.intp]]:
        """Per query the positions of every reference that may be among its `k` nearest.

        `best` holds the `k` largest peaks so far: each is another reference's similarity, so the least of them bounds
        the k-th largest from below.
        """
        best = np.full((len(queries), k), -np.inf, dtype=np.float32)
        found: list[tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]] = []
        for start, cells in self._products(queries):
            # (cells, queries): the best similarity within each 128 references.
            peaks = cells.max(axis=1)
            # (queries, k), in no order.
            best = np.partition(np.concatenate((best, peaks.T), axis=1), -k, axis=1)[:, -k:]
            least = best.min(axis=1) - MARGIN
            cell, query = np.nonzero(peaks >= least)
            # (hits, 128): only cells whose peak can matter are looked into.
            near = cells[cell, :, query]
            hit, offset = np.nonzero(near >= least[query, None])
            found.append((query[hit], start + cell[hit] * _CELL + offset, near[hit, offset]))
        rows, positions, similarities = (np.concatenate(part) for part in zip(*found, strict=True))
        # The bound has risen since the first blocks; the padding of the last cell has no position.
        kept = (similarities >= best.min(axis=1)[rows] - MARGIN) & (positions < len(self))
        order = np.argsort(rows[kept], kind="stable")
        counts = np.bincount(rows[kept], minlength=len(queries))
        return np.split(positions[kept][order], np.cumsum(counts)[:-1])

    def _products(self, queries: NDArray[np.float32]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """First position and similarities `(cells, 128, queries)` of each block; the last cell is padded with −∞."""
        # References times queries is a quarter faster in BLAS than queries times references.
        columns = np.ascontiguousarray(queries.T)
        product = np.empty((min(_BLOCK, -(-len(self) // _CELL) * _CELL), len(queries)), dtype=np.float32)
        for start in range(0, len(self), _BLOCK):
            units = self._units[start : start + _BLOCK]
            cells = -(-len(units) // _CELL)
            np.matmul(units, columns, out=product[: len(units)])
            product[len(units) : cells * _CELL] = -np.inf
            yield start, product[: cells * _CELL].reshape(cells, _CELL, len(queries))
