"""The published model behind plain FastAPI, one image per request: `python -m bench.serving_fastapi MODEL PORT`.

Takes the bytes of an image by POST /predict and answers {"label": 0 or 1}, on FastAPI's own threads.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import uvicorn
from fastapi import Body, FastAPI
from PIL import Image

from bench.contestants import PublishedModel


def app(model: Path) -> FastAPI:
    """The application with the model loaded."""
    loaded, made = PublishedModel(model), FastAPI()

    @made.post("/predict")
    def predict(data: bytes = Body(media_type="application/octet-stream")) -> dict[str, int]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return {"label": loaded.labels(loaded.transform(image)[None])[0]}

    return made


if __name__ == "__main__":
    uvicorn.run(app(Path(sys.argv[1])), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
