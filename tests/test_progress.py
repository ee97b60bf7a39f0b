"""A bar shows on terminals, and its absence changes nothing."""

import io
import sys

import pytest

from normfuse.errors import did_you_mean
from normfuse.progress import progress_bar


class Stream(io.StringIO):
    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def _work(*, show: bool = True, clock: bool = False) -> None:
    with progress_bar("first name", 3, show=show, clock=clock) as bar:
        bar.advance()
        bar.name("second name")
        bar.to(2, 4)


@pytest.mark.parametrize("clock", [False, True])
def test_a_terminal_shows_what_is_being_done(monkeypatch: pytest.MonkeyPatch, clock: bool) -> None:
    stream = Stream(terminal=True)
    monkeypatch.setattr(sys, "stderr", stream)
    _work(clock=clock)
    assert "second name" in stream.getvalue()


@pytest.mark.parametrize(("terminal", "show"), [(False, True), (True, False)])
def test_nothing_is_shown_elsewhere(monkeypatch: pytest.MonkeyPatch, terminal: bool, show: bool) -> None:
    stream = Stream(terminal=terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    _work(show=show)
    assert stream.getvalue() == ""


def test_without_rich_the_work_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(terminal=True)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    _work()
    assert stream.getvalue() == ""


def test_names_that_are_near_are_suggested() -> None:
    assert did_you_mean("mean_fre", ["mean_free", "compress"]) == "; did you mean 'mean_free'?"
    assert did_you_mean("resnet", ["resnet18", "resnet34", "vit"], most=3) == "; did you mean 'resnet34' or 'resnet18'?"
    assert did_you_mean(7, ["compress"]) == ""
