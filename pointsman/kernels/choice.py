"""One choice among named candidates: what was wanted, and the reason against each. What is made of it depends on nothing else."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

logger = logging.getLogger(__name__)


class Choice(NamedTuple):
    """A choice yet to be taken.

    Attributes:
        what: what the candidates are, for messages.
        wanted: a candidate's name, or "auto" for the first that can serve.
        reasons: for each candidate, in the order of preference, why it cannot serve, or None.
    """

    what: str
    wanted: str
    reasons: Mapping[str, str | None]

    @property
    def able(self) -> list[str]:
        """Those that can serve."""
        return [name for name, reason in self.reasons.items() if reason is None]

    @property
    def refusal(self) -> str | None:
        """Why the choice comes to nothing, or None."""
        if self.wanted == "auto":
            return None if self.able else f"no {self.what} can serve here ({self._against()})"
        if self.wanted not in self.reasons:
            return f"unknown {self.what} {self.wanted!r}; known are auto, {', '.join(self.reasons)}"
        if (reason := self.reasons[self.wanted]) is None:
            return None
        return f"{self.what} {self.wanted!r} cannot serve here: {reason}; these can: {', '.join(self.able) or 'none'}"

    @property
    def chosen(self) -> str | None:
        """The candidate that is taken; None where there is a refusal."""
        if self.refusal is not None:
            return None
        return self.able[0] if self.wanted == "auto" else self.wanted

    def take(self) -> str:
        """The candidate that is taken; what became of "auto" is logged.

        Raises:
            ValueError: the name is unknown, or there is a reason against it; the message has the reasons and what would work.
        """
        if (chosen := self.chosen) is None:
            raise ValueError(self.refusal)
        if self.wanted == "auto":
            against = self._against()
            logger.info("%s: %s (auto%s)", self.what, chosen, f"; {against}" if against else "")
        return chosen

    def _against(self) -> str:
        return "; ".join(f"{name}: {reason}" for name, reason in self.reasons.items() if reason is not None)
