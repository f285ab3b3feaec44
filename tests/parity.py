"""A checkpoint in the published form with random weights, images, and what the published pipeline says of them.

The pipeline is the reference: Pillow → torchvision → transformers `ViTModel`, CLS token → scikit-learn.
Nothing of `code_worker` takes part in it.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import joblib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import OneClassSVM
from torchvision.transforms import v2

from tests import kernels
from tests.parity_images import write_images

if TYPE_CHECKING:
    from transformers import ViTModel

torch.set_num_threads(kernels.threads())

LINEAR_FILE = "linear_tot_classifier_epoch-32.sav"
KNN_FILE = "knn_tot_classifier_epoch-32.sav"
SVM_FILE = "ocsvm_kernel_poly_gamma_auto_nu_0_1_crop.joblib"
ARRAYS_FILE = "arrays.npz"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class ParitySet:
    """What was published and what comes out of it; rows are in the order of `names`.

    Attributes:
        directory: `config.json`, `model.safetensors`, `preprocessor_config.json` and `sklearn/`.
        images: file by name.
        crops: `(224, 224, 3) uint8` by name.
        embeddings: `(n, 192) float32`.
        linear, knn: 0 real, 1 fake; `linear_p` is P(fake).
        svm_raw: +1 real, −1 fake; `svm_decision` is the signed distance, positive inside.
    """

    directory: Path
    images: dict[str, Path]
    crops: dict[str, NDArray[np.uint8]]
    names: list[str]
    embeddings: NDArray[np.float32]
    linear: NDArray[np.int64]
    linear_p: NDArray[np.float64]
    knn: NDArray[np.int64]
    svm_raw: NDArray[np.int64]
    svm_decision: NDArray[np.float64]

    def stacked_crops(self) -> NDArray[np.uint8]:
        """`(n, 224, 224, 3)` in the order of `names`."""
        return np.stack([self.crops[name] for name in self.names])


def build_parity_set(root: Path, seed: int = 7) -> None:
    """Writes a set below the empty directory `root`; the same seed gives the same set on one machine."""
    directory, pictures = root / "published", root / "images"
    (directory / "sklearn").mkdir(parents=True)
    pictures.mkdir()
    model = random_vit(seed)
    save_published(model, directory)
    images = write_images(pictures, seed)
    crops = {name: reference_crop(path) for name, path in images.items()}
    embeddings = reference_embeddings(model, np.stack(list(crops.values())))
    linear, knn, svm = _write_heads(directory / "sklearn", embeddings, seed)
    np.savez(
        root / ARRAYS_FILE,
        crops=np.stack(list(crops.values())),
        embeddings=embeddings,
        linear=linear.predict(embeddings),
        linear_p=linear.predict_proba(embeddings)[:, 1],
        knn=knn.predict(embeddings),
        svm_raw=svm.predict(embeddings),
        svm_decision=svm.decision_function(embeddings),
    )


def read_parity_set(root: Path) -> ParitySet:
    """What `build_parity_set` wrote there."""
    images = {path.name: path for path in sorted((root / "images").iterdir())}
    with np.load(root / ARRAYS_FILE) as arrays:
        values = dict(arrays)
    return ParitySet(
        directory=root / "published",
        images=images,
        crops=dict(zip(images, values.pop("crops"), strict=True)),
        names=list(images),
        **values,
    )


def random_vit(seed: int, **changes: object) -> ViTModel:
    """A ViT-Tiny whose weights are large enough that two images differ in every one of the 192 numbers.

    The library's own initialisation is so small that the CLS token hardly sees the image.
    """
    # Four seconds of processor time, for which no process waits that makes no such model.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a foreign package warns of while it is imported is not ours to mend
        from transformers import ViTConfig, ViTModel
        from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    sizes = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "layer_norm_eps": 1e-12}
    model = ViTModel(ViTConfig(**{**sizes, **changes})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            centre = 1.0 if "layernorm" in name and name.endswith("weight") else 0.0
            weight.copy_(centre + 0.05 * torch.randn(weight.shape, generator=generator))
    return model


def save_published(model: ViTModel, directory: Path) -> None:
    """Writes `config.json`, `model.safetensors` and the preprocessor file as they stand on the hub."""
    model.save_pretrained(directory)
    preprocessor = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "ViTImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "size": {"height": 224, "width": 224},
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")


def reference_crop(path: Path) -> NDArray[np.uint8]:
    """`(224, 224, 3) uint8`, by Pillow and torchvision."""
    with Image.open(path) as image:
        return np.asarray(v2.CenterCrop(224)(image.convert("RGB")))


def reference_embeddings(model: ViTModel, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
    """`(n, 192) float32` for `(n, 224, 224, 3) uint8`, one image at a time as the published script does."""
    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    with torch.inference_mode():
        rows = [model(transform(Image.fromarray(crop))[None]).last_hidden_state[0, 0] for crop in crops]
    return torch.stack(rows).numpy()


def _write_heads(
    directory: Path, embeddings: NDArray[np.float32], seed: int
) -> tuple[LogisticRegression, KNeighborsClassifier, OneClassSVM]:
    """Heads fitted on a cloud round the embeddings, cut through its middle so that both classes are met."""
    rng = np.random.default_rng(seed)
    centre, spread = embeddings.mean(0), embeddings.std(0)
    near = embeddings[rng.integers(len(embeddings), size=600)]
    cloud = (near + rng.normal(size=near.shape) * 0.7 * spread).astype(np.float32)
    labels = ((cloud - centre) @ (rng.normal(size=192) / spread) > 0).astype(np.int64)
    linear = LogisticRegression(C=0.316, class_weight="balanced", max_iter=1500).fit(cloud, labels)
    knn = KNeighborsClassifier(n_neighbors=1, weights="uniform", metric="cosine").fit(cloud, labels)
    svm = OneClassSVM(nu=0.1, kernel="poly", gamma="auto").fit(cloud[labels == 0])
    for head, name in ((linear, LINEAR_FILE), (knn, KNN_FILE), (svm, SVM_FILE)):
        joblib.dump(head, directory / name)
    return linear, knn, svm
