"""The worker pool, and hypothesis's profiles.

`ci` is the default; `pytest --hypothesis-profile thorough` tries more examples.
"""

import pytest
from hypothesis import settings

from pool import worker_pool

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=100)
settings.register_profile("thorough", deadline=None, max_examples=2000)
settings.load_profile("ci")


def pytest_addoption(parser):
    parser.addoption(
        "--cases",
        type=int,
        default=12,
        help="random products of layout and features that test_fuzz.py tries",
    )
    parser.addoption("--case", help="one of them to repeat, as a failure prints it")
    parser.addoption(
        "--planted", action="store_true", help="also search for each planted bug from the beginning"
    )


@pytest.fixture(scope="session")
def pool():
    """`pool(n, function, *args, timeout=120, **kwargs) -> [result of each rank]`.

    See `pool.worker_pool`.
    """
    with worker_pool() as call:
        yield call
