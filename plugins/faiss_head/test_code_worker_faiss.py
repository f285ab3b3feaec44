"""The graph's head keeps the rules, finds what the exact search finds, and tells the truth about how often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from code_worker_faiss import code_worker_register_heads
from code_worker_faiss.graph import GraphIndex
from code_worker_faiss.head import HnswHead

from code_worker.errors import ArtifactError
from code_worker.testing import assert_head_conforms, sample_embeddings
from code_worker_heads.knn import NearestNeighbourHead
from code_worker_heads.search import MARGIN, unit_rows

RNG = np.random.default_rng(0)
REFERENCES = RNG.normal(size=(3000, 192)).astype(np.float32)
LABELS = RNG.integers(0, 2, 3000).astype(np.int8)
QUERIES = RNG.normal(size=(200, 192)).astype(np.float32)
NARROW = {"links": 4, "ef_construction": 8, "ef_search": 8}


def test_the_head_conforms() -> None:
    (spec,) = code_worker_register_heads()
    assert spec.name == "knn-faiss"
    assert_head_conforms(spec)
    assert_head_conforms(spec, {"n_neighbors": 5, "links": 8})


@pytest.mark.parametrize("k", [1, 4, pytest.param(5, marks=pytest.mark.numeric)])
def test_where_every_reference_is_in_view_it_scores_as_the_exact_head(k: int) -> None:
    options = {"n_neighbors": k}
    head = HnswHead({**options, "ef_construction": 200, "ef_search": 3000}).fit(REFERENCES, LABELS)
    exact = NearestNeighbourHead(options).fit(REFERENCES, LABELS)
    assert head.recall > 0.999
    # Of neighbours that are equally near in float32 the graph takes any; the two distances add up to more than 1.
    np.testing.assert_allclose(head.score(QUERIES), exact.score(QUERIES), atol=float(MARGIN), rtol=0)
    assert (head.score(REFERENCES[:50]) >= 0.5).tolist() == (exact.score(REFERENCES[:50]) >= 0.5).tolist()


def test_the_recall_it_logs_is_that_of_queries_it_has_not_seen(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        head = HnswHead(NARROW).fit(REFERENCES, LABELS)
    line: Any = caplog.records[-1].msg
    assert line["event"] == "recall_measured"
    assert line["recall"] == round(head.recall, 4)
    assert (line["queries"], line["references"]) == (300, 3000)
    found = []
    for label in (0, 1):
        positions, graph = head._graphs[label]  # noqa: SLF001 - what the recall is about
        assert (LABELS[positions] == label).all()
        units = unit_rows(QUERIES)
        nearest = (units @ unit_rows(REFERENCES[positions]).T).argmax(axis=1)
        found.append((graph.nearest(units, 1)[1][:, 0] == nearest).mean())
    assert 0.05 < head.recall < 0.9
    assert head.recall == pytest.approx(np.mean(found), abs=0.1)


def test_a_wider_view_finds_more() -> None:
    recalls = [HnswHead({**NARROW, "ef_search": view}).fit(REFERENCES, LABELS).recall for view in (4, 32, 256)]
    assert recalls[0] + 0.1 < recalls[1] < recalls[2]


def test_it_comes_back_from_its_files_with_its_recall_and_another_view_if_asked(tmp_path: Path) -> None:
    head = HnswHead(NARROW).fit(REFERENCES, LABELS)
    head.save(tmp_path)
    again = HnswHead.load(tmp_path)
    assert again.recall == head.recall
    assert again.score(QUERIES).tobytes() == head.score(QUERIES).tobytes()
    assert HnswHead.load(tmp_path, {"ef_search": 500}).score(QUERIES).tobytes() != head.score(QUERIES).tobytes()


def test_files_that_contradict_one_another_are_refused() -> None:
    state = HnswHead().fit(*sample_embeddings(40)).state()
    damaged = {
        "cannot be read": {"graph_real": state["graph_real"][:100]},
        "references with": {"positions_real": state["positions_real"][1:]},
        "each once": {"positions_real": state["positions_generated"]},
        "must be HNSW": {"graph_real": _flat_index()},
    }
    for message, change in damaged.items():
        with pytest.raises(ArtifactError, match=message):
            HnswHead().restore({**state, **change})
    with pytest.raises(ArtifactError, match="41 neighbours with only 40"):
        HnswHead({"n_neighbors": 41}).restore(state)


def _flat_index() -> np.ndarray:
    return np.asarray(faiss.serialize_index(faiss.IndexFlatIP(192)))


def test_a_handful_of_references_is_enough_and_one_class_is_not() -> None:
    head = HnswHead().fit(np.eye(2, 192, dtype=np.float32), np.array([0, 1], dtype=np.int8))
    assert head.recall == 1
    assert head.score(np.eye(2, 192, dtype=np.float32)).tolist() == [0, 1]
    with pytest.raises(ValueError, match="both real"):
        HnswHead().fit(REFERENCES[:5], np.zeros(5, dtype=np.int8))


def test_what_the_graph_does_not_lead_to_is_as_far_as_can_be() -> None:
    graph = GraphIndex.empty(4, 8)
    graph.add(np.eye(3, 192, dtype=np.float32), 1)
    distances, positions = graph.nearest(np.eye(1, 192), 5)
    np.testing.assert_allclose(distances, [[0, 1, 1, 2, 2]], atol=1e-7)
    assert positions[0, 0] == 0
