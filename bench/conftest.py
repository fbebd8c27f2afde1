"""Tables that the benchmarks print at the end of the run."""

import pytest

_LINES = pytest.StashKey()


def pytest_configure(config):
    config.stash[_LINES] = []


@pytest.fixture
def table(request):
    """table(*lines): shown under the run's summary, with or without -s."""
    return lambda *lines: request.config.stash[_LINES].extend([*lines, ""])


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[_LINES]:
        terminalreporter.section("speed", sep="=")
        for line in config.stash[_LINES]:
            terminalreporter.write_line(line)
