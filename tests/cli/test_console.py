"""The console script as a whole: help, version, logging."""

import logging
import re
import shlex
import sys

import pytest

import rgtg_fast
from rgtg_fast.cli import COMMANDS, main, parser


def said(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def test_the_version_is_the_packages(capsys):
    assert said(capsys, "--version") == (0, f"rgtg-fast {rgtg_fast.__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_an_example_that_can_be_given(capsys, command):
    code, out, _ = said(capsys, command, "--help")
    example = COMMANDS[command].EXAMPLE
    assert code == 0 and f"example:\n  {example}\n" in out
    program, *argv = shlex.split(example)
    assert program == "rgtg-fast" and parser().parse_args(argv).command == command


def test_the_help_names_every_command(capsys):
    _, out, _ = said(capsys, "--help")
    for name, command in COMMANDS.items():
        assert re.search(rf"^ +{name} +{command.HELP.split()[0]}", out, re.MULTILINE)


@pytest.mark.parametrize("argv", [["--verbose", "info"], ["info", "--verbose"]], ids=" ".join)
def test_verbose_goes_before_the_command_or_behind_it(capsys, monkeypatch, argv):
    def fails(args):
        logging.getLogger("rgtg_fast.some.part").debug("how far it is")
        raise ValueError("wrong\n  in two lines")

    monkeypatch.setattr(COMMANDS["info"], "run", fails)
    code, _, err = said(capsys, *argv)
    assert code == 2 and "Traceback" in err and "DEBUG rgtg_fast.some.part: how far it is" in err
    assert err.endswith("\ninfo: wrong in two lines\n")


def test_without_verbose_the_log_is_plain_and_errors_are_one_line(capsys, monkeypatch):
    def fails(args):
        logging.getLogger("rgtg_fast.some.part").debug("how far it is")
        logging.getLogger("rgtg_fast.some.part").info("begins")
        raise ValueError("wrong")

    monkeypatch.setattr(COMMANDS["info"], "run", fails)
    assert said(capsys, "info") == (2, "", "begins\ninfo: wrong\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("e"), 2), (OSError("e"), 1), (ImportError("e"), 1), (MemoryError("e"), 1)],
    ids=lambda value: type(value).__name__,
)
def test_bad_input_ends_with_2_and_failures_with_1(capsys, monkeypatch, error, code):
    def fails(args):
        raise error

    monkeypatch.setattr(COMMANDS["demo"], "run", fails)
    assert said(capsys, "demo") == (code, "", "demo: e\n")


def test_logging_is_as_it_was_after_a_command(capsys, monkeypatch):
    logger = logging.getLogger("rgtg_fast")
    before = logger.level, list(logger.handlers)
    monkeypatch.setattr(COMMANDS["info"], "run", lambda args: None)
    main(["--verbose", "info"])
    assert (logger.level, logger.handlers) == before


def test_the_log_goes_where_standard_error_is_at_the_time(capsys, monkeypatch):
    class Bar:
        text = ""

        def write(self, text):
            Bar.text += text

        def flush(self):
            pass

    def replaced(args):
        monkeypatch.setattr(sys, "stderr", Bar())
        logging.getLogger("rgtg_fast").warning("above the bar")

    monkeypatch.setattr(COMMANDS["info"], "run", replaced)
    main(["info"])
    assert Bar.text == "above the bar\n"
