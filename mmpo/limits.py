"""Numbers with limits, for the signatures of losses and judges: a recipe is held to them before anything is loaded."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
FlipRate = Annotated[float, Field(ge=0, lt=0.5)]  # how often a label is the wrong way round; at 1/2 it says nothing
SomeFlipRate = Annotated[float, Field(gt=0, lt=0.5)]
Count = Annotated[int, Field(ge=1)]
