"""Unit vectors of images and texts, and which of them are nearest: by faiss where it is installed, by numpy where it is not."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmpo.datasets.tools import Embedder
from mmpo.pair import Block

Vectors = NDArray[np.float32]  # (N, D), each row of length 1
ROWS = 1024  # queries at once in numpy's search: with a pool of a million, 4 GiB of cosines would be too many


def in_batches(encode: Callable[[Sequence[Block]], Tensor], size: int) -> Embedder:
    """An embedder from a model: `encode` gives (n, D) vectors of any length for at most `size` blocks.

    Raises ValueError for a vector that is zero or not finite: it has no direction.
    """

    def embed(blocks: Sequence[Block]) -> np.ndarray:
        with torch.inference_mode():
            parts = [encode(blocks[at : at + size]).float().cpu().numpy() for at in range(0, len(blocks), size)]
        found = np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
        lengths = np.linalg.norm(found, axis=-1, keepdims=True)
        if not (np.isfinite(lengths) & (lengths > 0)).all():
            at = int(np.argmin(np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)))
            raise ValueError(f"embedder: the vector of block {at} ({blocks[at].kind}) has length {lengths[at, 0]}")
        return (found / lengths).astype(np.float32)

    return embed


def cosines(embed: Embedder, first: Sequence[Block], second: Sequence[Block]) -> NDArray[np.float32]:
    """Cosine of each block of `first` with its counterpart, (N,), from one call of the embedder."""
    found = embed([*first, *second])
    return (found[: len(first)] * found[len(first) :]).sum(-1)


class Index:
    """Exact search for the largest inner product. vectors: (N, D) of length 1."""

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = np.ascontiguousarray(vectors, np.float32)
        self._faiss = None
        if importlib.util.find_spec("faiss") is None:
            found = "faiss is not installed: neighbours are searched by numpy, which finds the same ones more slowly; "
            warnings.warn(found + "install it with: pip install 'mmpo[retrieval]'", stacklevel=2)
        elif len(self.vectors):
            import faiss

            self._faiss = faiss.IndexFlatIP(self.vectors.shape[1])
            self._faiss.add(self.vectors)

    def nearest(self, queries: Vectors, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Cosines and rows of the k nearest vectors of each query, (Q, k) each, best first, equals by their row.

        k may not be over N, or ValueError.
        """
        if not 0 < k <= len(self.vectors):
            raise ValueError(f"index: expected k from 1 to {len(self.vectors)}, the number of vectors, found {k}")
        queries = np.ascontiguousarray(queries, np.float32)
        scores, rows = self._faiss.search(queries, k) if self._faiss is not None else self._by_numpy(queries, k)
        order = np.lexsort((rows, -scores), axis=-1)
        return np.take_along_axis(scores, order, -1), np.take_along_axis(rows, order, -1)

    def _by_numpy(self, queries: Vectors, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        for at in range(0, len(queries), ROWS):
            found = queries[at : at + ROWS] @ self.vectors.T
            best = np.argpartition(-found, k - 1, axis=-1)[:, :k]
            rows[at : at + ROWS], scores[at : at + ROWS] = best, np.take_along_axis(found, best, -1)
        return scores, rows
