"""The reader of published estimator files: reads what scikit-learn writes, refuses the rest by name."""

from __future__ import annotations

import ast
import inspect
import io
import os
import pickle
import random
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import sklearn
from sklearn.ensemble import RandomForestClassifier
from sklearn.neighbors import KNeighborsClassifier

from code_worker.errors import ArtifactError, UnsafeArtifactError
from code_worker.releases import importing, pickled
from code_worker.releases.importing import read_estimator
from tests.heads.samples import clouds, fitted_estimators

ESTIMATORS = fitted_estimators()


def written(fitted: object, path: Path) -> Path:
    joblib.dump(fitted, path)
    return path


def same_state(path: Path, fitted: object) -> None:
    state = read_estimator(path)
    assert state.class_name == type(fitted).__name__
    expected = dict(vars(fitted))
    assert set(state.params) | set(state.arrays) == set(expected)
    for name, value in expected.items():
        if isinstance(value, np.ndarray):
            assert state.arrays[name].dtype == value.dtype
            np.testing.assert_array_equal(state.arrays[name], value)
        else:
            assert state.params[name] == value


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("compress", [0, "zlib", "gzip", "bz2", "xz", "lzma"])
def test_files_of_joblib_read_as_scikit_learn_wrote_them(name: str, compress: str | int, tmp_path: Path) -> None:
    joblib.dump(ESTIMATORS[name], tmp_path / "head", compress=(compress, 3) if compress else 0)
    same_state(tmp_path / "head", ESTIMATORS[name])


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_pickles_of_every_current_protocol_read_too(name: str, protocol: int, tmp_path: Path) -> None:
    (tmp_path / "head.sav").write_bytes(pickle.dumps(ESTIMATORS[name], protocol=protocol))
    same_state(tmp_path / "head.sav", ESTIMATORS[name])


def test_the_version_that_wrote_the_file_is_told(tmp_path: Path) -> None:
    assert read_estimator(written(ESTIMATORS["svm"], tmp_path / "a.sav")).sklearn_version == sklearn.__version__


def test_numpy_scalars_and_fortran_order_are_understood(tmp_path: Path) -> None:
    head = KNeighborsClassifier(n_neighbors=np.int64(1), metric="cosine")
    embeddings, labels = clouds(20, 1)
    head.fit(embeddings, labels)
    head._fit_X = np.asfortranarray(embeddings)
    state = read_estimator(written(head, tmp_path / "a.sav"))
    assert state.params["n_neighbors"] == 1
    np.testing.assert_array_equal(state.arrays["_fit_X"], embeddings)


class Malicious:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    ("function", "asked"), [(os.system, "system"), (eval, "eval"), (subprocess.check_output, "check_output")]
)
def test_a_malicious_pickle_is_refused_by_the_name_of_what_it_asked_for(
    function: object, asked: str, protocol: int, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    arguments = {
        "system": (f"touch {trace}",),
        "eval": (f"open({str(trace)!r}, 'w')",),
        "check_output": (["touch", str(trace)],),
    }
    path = tmp_path / "head.sav"
    path.write_bytes(pickle.dumps(Malicious(function, *arguments[asked]), protocol=protocol))
    with pytest.raises(UnsafeArtifactError, match=asked):
        read_estimator(path)
    assert not trace.exists()


def test_a_call_hidden_in_a_true_estimator_is_refused(tmp_path: Path) -> None:
    head = fitted_estimators()["linear"]
    head.coef_ = Malicious(os.system, f"touch {tmp_path / 'trace'}")  # type: ignore[attr-defined]
    with pytest.raises(UnsafeArtifactError, match=r"head\.sav.*posix\.system"):
        read_estimator(written(head, tmp_path / "head.sav"))
    assert not (tmp_path / "trace").exists()


def test_other_estimators_are_refused_by_name(tmp_path: Path) -> None:
    forest = RandomForestClassifier(n_estimators=2).fit(*clouds(20, 0))
    with pytest.raises(UnsafeArtifactError, match=r"sklearn\.ensemble\._forest\.RandomForestClassifier"):
        read_estimator(written(forest, tmp_path / "forest.joblib"))


def test_an_array_of_objects_is_refused(tmp_path: Path) -> None:
    head = fitted_estimators()["linear"]
    head.classes_ = np.array([Malicious(print), None], dtype=object)  # type: ignore[attr-defined]
    with pytest.raises(UnsafeArtifactError, match="array of Python objects"):
        read_estimator(written(head, tmp_path / "head.sav"))


CALL_OF_NOTHING_ALLOWED = [
    (b"\x80\x02cnumpy\ndtype\n]R.", "not a name"),
    (b"\x80\x02csklearn.svm._classes\nOneClassSVM\n)R.", "call 'sklearn.svm._classes.OneClassSVM'"),
    (b"\x80\x02csklearn.svm._classes\nOneClassSVM\nK\x01\x85\x81.", "unexpected way"),
    (b"\x80\x02K\x01)R.", "not a name"),
    (b"\x80\x02\x82\x01.", "EXT1"),
    (b"\x80\x02X\x01\x00\x00\x00aQ.", "BINPERSID"),
    (b"(iposix\nsystem\n.", "INST"),
    (b"\x80\x05\x97.", "NEXT_BUFFER"),
    (b"\x80\x02cjoblib.numpy_pickle\nNDArrayWrapper\n)\x81.", "NDArrayWrapper"),
    (b"\x80\x02ccopyreg\n_reconstructor\n.", "copyreg._reconstructor"),
]


@pytest.mark.parametrize(("content", "asked"), CALL_OF_NOTHING_ALLOWED)
def test_every_other_way_to_call_something_is_refused(content: bytes, asked: str, tmp_path: Path) -> None:
    (tmp_path / "a.sav").write_bytes(content)
    with pytest.raises(UnsafeArtifactError, match=asked):
        read_estimator(tmp_path / "a.sav")


def test_an_array_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    path = written(ESTIMATORS["knn"], tmp_path / "a.sav")
    content = path.read_bytes()
    shape = b"K\xc0\x86"
    assert content.count(shape)
    # 192 columns become 2**62: as bytes that is more than any machine has.
    bomb = content.replace(shape, b"\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x40\x86")
    path.write_bytes(bomb)
    with pytest.raises(ArtifactError, match=r"a\.sav: damaged"):
        read_estimator(path)


def test_a_file_that_inflates_without_measure_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bomb.joblib").write_bytes(zlib.compress(bytes(64 * 2**20), 9))
    with pytest.raises(ArtifactError, match="once decompressed"):
        read_estimator(tmp_path / "bomb.joblib")


def test_keys_that_take_exponential_time_to_hash_are_refused(tmp_path: Path) -> None:
    nested = b"K\x01" + b"\x71\x00h\x00\x86" * 60
    (tmp_path / "a.sav").write_bytes(b"\x80\x02}" + nested + b"K\x01s.")
    with pytest.raises(ArtifactError, match="damaged"):
        read_estimator(tmp_path / "a.sav")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b"not a pickle", "damaged|instruction"),
        (pickle.dumps({"a": 1}), "no fitted estimator"),
        (pickle.dumps(3) + b"more", "damaged"),
        (b"\x78\x9cgarbage", "damaged compressed file"),
        (b"\x04\x22\x4d\x18....", "lz4"),
    ],
)
def test_files_that_are_something_else_say_so(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.sav").write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        read_estimator(tmp_path / "a.sav")


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"none\.sav: cannot be read: No such file"):
        read_estimator(tmp_path / "none.sav")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_damaged_files_read_or_end_in_an_artifact_error(name: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    joblib.dump(ESTIMATORS[name], buffer)
    joblib_file, plain = buffer.getvalue(), pickle.dumps(ESTIMATORS[name])
    chance = random.Random(name)
    path, refused = tmp_path / "fuzzed.sav", 0
    for _ in range(1500):
        content = bytearray(chance.choice((joblib_file, plain)))
        for _ in range(chance.randint(1, 3)):
            at = min(int(chance.expovariate(1 / 400)), max(len(content) - 1, 0))
            kind = chance.randrange(4)
            if kind == 0:
                content[at : at + 1] = chance.randbytes(1)
            elif kind == 1:
                del content[at : at + chance.randint(1, 40)]
            elif kind == 2:
                content[at:at] = chance.randbytes(chance.randint(1, 12))
            else:
                del content[len(content) - at :]
        path.write_bytes(content)
        try:
            read_estimator(path)
        except ArtifactError:
            refused += 1
    assert refused > 500


def test_the_reader_imports_neither_joblib_nor_scikit_learn() -> None:
    script = "import sys, code_worker.releases.importing; print({'joblib', 'sklearn', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_reader_never_names_the_pickle_module() -> None:
    for module in (importing, pickled):
        tree = ast.parse(inspect.getsource(module))
        imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        sources = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert "pickle" not in imported
        assert "pickle" not in sources
