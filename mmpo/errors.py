"""The exceptions with an exit code of their own; `mmpo.cli.main` maps them, a library user catches them."""

from __future__ import annotations

from collections.abc import Iterable

SHOWN = 50  # problems in one message; the rest is counted


class RecipeError(ValueError):
    """A recipe, a name or an option that cannot be used (exit 2). problems: one line each, all that were found."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        more = [f"and {len(self.problems) - SHOWN} more problems"] if len(self.problems) > SHOWN else []
        super().__init__("\n".join([*self.problems[:SHOWN], *more]))


class DataError(ValueError):
    """Rows that cannot be used (exit 3). The message names the file, the row and the field."""


class RunFailed(RuntimeError):
    """A run that started and could not finish (exit 1). The message says what to do."""


class MissingExtra(ImportError):
    """An optional dependency that is not installed (exit 4)."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; install it with: pip install 'mmpo[{extra}]'")
