"""The published model behind LitServe, in batches: `python -m bench.serving_litserve MODEL PORT`.

Takes the bytes of an image by POST /predict and answers {"label": 0 or 1}.
"""

import io
import sys
from pathlib import Path
from typing import Annotated, Any

import litserve
import torch
from fastapi import Body
from PIL import Image

from bench.contestants import PublishedModel

MAX_BATCH = 32
BATCH_TIMEOUT_S = 0.02
# LitServe looks at the annotation itself: this module postpones none.
Payload = Annotated[bytes, Body(media_type="application/octet-stream")]


class Moderation(litserve.LitAPI):  # type: ignore[misc]  # not typed
    """What comes within a moment is one batch; named by its module, since LitServe's worker process unpickles it."""

    def __init__(self, model: Path) -> None:
        super().__init__(max_batch_size=MAX_BATCH, batch_timeout=BATCH_TIMEOUT_S)
        self.model = model

    def setup(self, device: str) -> None:
        """Loads the model in the worker process."""
        self.loaded = PublishedModel(self.model)

    def decode_request(self, request: Payload) -> bytes:
        """The bytes as they are: a batch is decoded at once."""
        return request

    def batch(self, inputs: list[bytes]) -> Any:
        """Bytes to `(n, 3, 224, 224) float32`."""
        images = [Image.open(io.BytesIO(data)).convert("RGB") for data in inputs]
        return torch.stack([self.loaded.transform(image) for image in images])

    def predict(self, x: Any) -> list[int]:
        """Labels of a batch."""
        return self.loaded.labels(x)

    def unbatch(self, output: list[int]) -> list[int]:
        """They are a list already."""
        return output

    def encode_response(self, output: int) -> dict[str, int]:
        """The answer's body."""
        return {"label": output}


if __name__ == "__main__":
    server = litserve.LitServer(Moderation(Path(sys.argv[1])), accelerator="cpu", timeout=300)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", generate_client_file=False)
