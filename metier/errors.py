"""What can go wrong because of a user's input or machine, one class per place to look.

    MetierError
      RecipeError      the recipe file, or a --set override
      DataError        a source file, a column, a record
      ModelError       the base model, the tokenizer, an adapter
      LabelError       prompts and answers do not become the labels that training needs
        ControlTokenError  a message spells one of the model's control tokens
      RunError         the output folder, a checkpoint, the disk
    Interrupted        SIGTERM or Ctrl-C: the work so far is saved

An error says what happened, with the value and the place, and what was expected; `hint` says how to
go on. The CLI prints both and exits with 2, without a traceback. Record text never enters a message.
"""

from __future__ import annotations


class MetierError(Exception):
    """The user can put this right. `message` says what is wrong, `hint` what to do about it."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class RecipeError(MetierError):
    """The recipe, or an override of it, is not what metier understands."""


class DataError(MetierError):
    """A source file, a column or the records as a whole cannot be used."""


class ModelError(MetierError):
    """The base model, its tokenizer or an adapter cannot be loaded or does not fit."""


class LabelError(MetierError):
    """What would be trained is not the answers and their end-of-turn tokens."""


class ControlTokenError(LabelError):
    """A message spells a control token of the model: this record alone cannot be used."""


class RunError(MetierError):
    """The run's folder, a checkpoint in it or the disk under it cannot be used."""


class Interrupted(Exception):
    """A signal asked metier to stop; `exit_code` is 128 + the signal's number (130, 143)."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = 128 + signal_number


def did_you_mean(word: str, known: list[str]) -> str:
    """` (did you mean `x`?)` when `word` is close to a known word, else an empty string."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean `{close[0]}`?)" if close else ""
