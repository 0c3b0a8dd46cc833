"""Prompts without their images: what a model still gets right then, it does not read off the images."""

from __future__ import annotations

import numpy as np

from mmpo.media import size
from mmpo.pair import Block

GREY = 128


def blinded(prompt: tuple[Block, ...]) -> tuple[Block, ...] | None:
    """The prompt with a grey picture of the same size in place of each image; None where it has none."""
    if not any(block.kind == "image" for block in prompt):
        return None
    return tuple(_grey(block) if block.kind == "image" else block for block in prompt)


def _grey(block: Block) -> Block:
    width, height = size(block)
    return Block("image", np.full((height, width, 3), GREY, np.uint8), role=block.role)
