"""Tries to mix up the two histories of a comparison in the terminal, or to lose a part of an answer."""

from __future__ import annotations

import pytest

from metier.cli.compare import comparing
from metier.errors import ModelError
from metier.serving.models import Models
from metier.serving.sampling import Sampling


def test_both_answers_are_shown_whole_and_kept_apart(models: Models, capsys: pytest.CaptureFixture[str]) -> None:
    two = Models(models.bank, models.renderer, {k: models.by_name[k] for k in ("base", "red")})
    with comparing(two) as sides:
        for question in ("Hello", "And now?"):
            sides.ask([{"role": "user", "content": question}], 6, Sampling())
        assert sides.histories["base"] != sides.histories["red"]
        for history in sides.histories.values():
            assert [m["role"] for m in history] == ["user", "assistant"] * 2
        with pytest.raises(ModelError, match="room for 512"):
            sides.ask([{"role": "user", "content": "x"}], 512, Sampling())
    shown = capsys.readouterr().out
    assert "base" in shown and "red" in shown and "tok/s" in shown


def test_a_base_alone_has_nothing_beside_it(models: Models) -> None:
    alone = Models(models.bank, models.renderer, {"base": models.by_name["base"]})
    with pytest.raises(ModelError, match="nothing to compare"), comparing(alone):
        pass
