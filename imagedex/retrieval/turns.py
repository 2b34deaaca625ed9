"""Dialogues as queries: the turns of one stand on one line, and some of them, or all together, are asked with."""

from dataclasses import dataclass
from typing import Literal

TAB = "\t"


@dataclass(frozen=True)
class Turns:
    """Which turns of a dialogue are asked with.

    Attributes:
        ask: "last", the last turn; "each", every turn, one after the other; "context", all of them as one query.
        separator: what stands between two turns on a line.
        response: the last turn is the response: it is not asked with, nor part of the context.
    """

    ask: Literal["last", "each", "context"]
    separator: str = TAB
    response: bool = False

    def of(self, cell: object) -> list[str] | None:
        """The turns of a dialogue, the response taken off; of text, or of a list of texts. None of what is neither."""
        turns = cell.split(self.separator) if isinstance(cell, str) else cell
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            return None
        return turns[:-1] if self.response else turns

    def queries(self, turns: list[str]) -> list[str]:
        """What is asked, blank turns left out; [] of a dialogue without a turn."""
        said = [turn for turn in turns if turn.strip()]
        if self.ask == "context":
            return [" ".join(said)] if said else []
        return said[-1:] if self.ask == "last" else said
