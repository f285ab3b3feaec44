"""Nearest neighbours among millions of references, by a graph whose recall is measured when it is built."""

from __future__ import annotations

from typing import Any, ClassVar, Final, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from code_worker.errors import ArtifactError
from code_worker.heads import EstimatorState
from code_worker.logs import get_logger
from code_worker_faiss.graph import GraphIndex
from code_worker_heads.knn import NearestNeighbourHead
from code_worker_heads.saved import Arrays, checked_embeddings, checked_labels, two_classes
from code_worker_heads.search import MARGIN, CosineIndex, unit_rows

__all__ = ["HnswHead"]

_QUERIES: Final = 1000

log = get_logger(__name__)


class HnswHead(NearestNeighbourHead):
    """Votes and scores as `knn` does, among references that the graph of each class leads to.

    `recall` is the share of the true nearest references that the graphs found, for up to 1,000 references that they
    did not hold at the time; it is logged by `fit` and saved with the head.
    """

    class Options(NearestNeighbourHead.Options):
        """Of `knn`, and the trade between recall, time and memory."""

        links: int = Field(32, ge=2, le=256, description="Links of a reference: HNSW's M.")
        ef_construction: int = Field(100, ge=1, description="References in view while the graph is built.")
        ef_search: int = Field(128, ge=1, description="References in view of a search.")
        threads: int = Field(
            1, ge=1, description="Threads that build the graphs; with more than one no two builds are quite the same."
        )

    kind: ClassVar = "knn-faiss"
    tolerance: ClassVar = 1e-4
    """The graph is searched in float32: on another processor it may lead to another reference, as near in float32."""
    layout: ClassVar = {
        "graph_generated": (("uint8",), (None,)),
        "graph_real": (("uint8",), (None,)),
        "positions_generated": (("int64",), (None,)),
        "positions_real": (("int64",), (None,)),
        "recall": (("float64",), (1,)),
    }
    options: Options

    recall: float
    _graphs: tuple[tuple[NDArray[np.intp], GraphIndex], ...]

    def fit(self, embeddings: NDArray[Any], labels: NDArray[Any]) -> Self:
        """Builds a graph per class, and measures what share of the exact search's answers they give.

        Raises:
            ValueError: fewer references than neighbours, one class alone, or values that are not finite.
        """
        references = checked_embeddings(embeddings)
        found = two_classes(checked_labels(labels, len(references)))
        if len(references) < self.options.n_neighbors:
            raise ValueError(
                f"{self.options.n_neighbors} neighbours cannot be found among {len(references)} references"
            )
        held = self._held_out(len(references))
        queries = unit_rows(references[held if held.any() else slice(None)])
        graphs, recalls = [], []
        for label in (0, 1):
            first, last = np.flatnonzero((found == label) & ~held), np.flatnonzero((found == label) & held)
            graph = GraphIndex.empty(self.options.links, self.options.ef_construction)
            graph.look_at(self.options.ef_search)
            graph.add(references[first], self.options.threads)
            if len(first):
                recalls.append(self._measured_recall(graph, CosineIndex(references[first]), queries))
            graph.add(references[last], self.options.threads)
            graphs.append((np.concatenate((first, last)), graph))
        self._take(graphs, float(np.mean(recalls)))
        log.info("recall_measured", recall=round(self.recall, 4), queries=len(queries), references=len(references))
        return self

    def _held_out(self, references: int) -> NDArray[np.bool_]:
        """Returns which references the graphs are first built without, `(references,) bool`.

        At most a tenth, at random.
        """
        held = np.zeros(references, dtype=bool)
        chosen = np.random.default_rng(0).choice(references, min(_QUERIES, references // 10), replace=False)
        held[chosen] = True
        return held

    def _measured_recall(self, graph: GraphIndex, exact: CosineIndex, queries: NDArray[np.float64]) -> float:
        k = min(self.options.n_neighbors, len(exact))
        found, true = graph.nearest(queries, k)[0], exact.nearest(queries, k)[0]
        # To a graph that holds float32 such references are equally near: any of them will do.
        return float((found <= true[:, -1:] + MARGIN).mean())

    def _take(self, graphs: list[tuple[NDArray[np.intp], GraphIndex]], recall: float) -> None:
        for _, graph in graphs:
            graph.look_at(self.options.ef_search)
        self._graphs, self.recall = tuple(graphs), recall
        self._classes = self._graphs

    def state(self) -> Arrays:
        """Both graphs as faiss writes them, where their references stood, and the recall."""
        (real, real_graph), (generated, generated_graph) = self._graphs
        return {
            "graph_generated": generated_graph.to_bytes(),
            "graph_real": real_graph.to_bytes(),
            "positions_generated": generated.astype(np.int64),
            "positions_real": real.astype(np.int64),
            "recall": np.array([self.recall]),
        }

    def restore(self, arrays: Arrays) -> Self:
        """Takes what `state` gave."""
        graphs = [
            (arrays[f"positions_{name}"].astype(np.intp), GraphIndex.from_bytes(arrays[f"graph_{name}"]))
            for name in ("real", "generated")
        ]
        for positions, graph in graphs:
            if len(positions) != len(graph) or len(graph) == 0:
                raise ArtifactError(f"a graph of {len(graph)} references with {len(positions)} positions")
        together = np.sort(np.concatenate([positions for positions, _ in graphs]))
        if not np.array_equal(together, np.arange(len(together))):
            raise ArtifactError("the positions of the references must be 0, 1, 2 and so on, each once")
        if len(together) < self.options.n_neighbors:
            raise ArtifactError(f"{self.options.n_neighbors} neighbours with only {len(together)} references")
        self._take(graphs, float(arrays["recall"][0]))
        return self

    @classmethod
    def from_estimator(cls, estimator: EstimatorState) -> None:
        """Nothing: a published `KNeighborsClassifier` is exact, and `knn` stands for it."""
        return
