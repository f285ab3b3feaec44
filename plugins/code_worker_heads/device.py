"""Nearest neighbours where matrix products are cheap: references kept on a GPU, searched there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLOCK: Final = 2**18
"""References per matrix product: 128 MiB of similarities for 128 queries."""


class DeviceSearch:
    """Unit rows `(n, 192) float32` on a device of torch's.

    Raises:
        RuntimeError: the device has no room for them.
    """

    def __init__(self, units: NDArray[np.float32], device: str) -> None:
        import torch

        from code_worker.encoder.forward import exact_arithmetic

        self._torch = torch
        # In fewer bits a nearest reference might be missed.
        self._exactly = exact_arithmetic
        self._device = device
        self._units = torch.from_numpy(units).to(device)

    def candidates(self, queries: NDArray[np.float32], k: int, margin: float) -> list[NDArray[np.intp]]:
        """Per query the positions of every reference whose similarity is within `margin` of the k-th largest."""
        torch = self._torch
        with torch.inference_mode(), self._exactly(torch.device(self._device).type):
            # Unit vectors: their products are cosines.
            rows = torch.from_numpy(queries).to(self._device)
            best = torch.full((len(queries), k), -torch.inf, device=self._device)
            parts = []
            for start in range(0, len(self._units), _BLOCK):
                # Queries by references: (n, block).
                similarities = rows @ self._units[start : start + _BLOCK].T
                # The k best of this block, then of all blocks so far: (n, k).
                top = torch.topk(similarities, min(k, similarities.shape[1])).values
                best = torch.topk(torch.cat((best, top), dim=1), k).values
                # Bounded by the best so far, so more may stay than in the end: the next to last line sifts again.
                query, position = (similarities >= best[:, -1:] - margin).nonzero(as_tuple=True)
                parts.append((query, position + start, similarities[query, position]))
            query, position, similarity = (torch.cat(part) for part in zip(*parts, strict=True))
            kept = similarity >= best[query, -1] - margin
            found: tuple[Any, Any] = query[kept].cpu().numpy(), position[kept].cpu().numpy()
        # Stable: positions of a query stay ascending, by which ties are decided.
        order = np.argsort(found[0], kind="stable")
        counts = np.bincount(found[0], minlength=len(queries))
        return np.split(found[1][order].astype(np.intp), np.cumsum(counts)[:-1])
