"""Error anchor: the ordinary training error of a denoiser, on the chosen side."""

from __future__ import annotations

from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset({"err"})
READS: frozenset[str] = frozenset()
PAPER: str = "arXiv 2412.21037"


def err_anchor(chosen: Side) -> Losses:
    """Mean squared error of the chosen side in the denoiser's own target (noise, v, velocity).

    loss = err_chosen

    TangoFlux adds it, with weight 1, to the DPO term of its flow model so that the winner's error cannot rise while
    the margin grows. It is the pretraining loss itself: no reference, no beta.
    """
    return Losses(chosen.extras["err"] / chosen.units)
