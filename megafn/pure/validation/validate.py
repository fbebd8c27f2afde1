"""Can this config run on so many processes? Every reason why not, at once, before anything is started."""

from __future__ import annotations

import attrs

from megafn.pure.config.field_types import all_fields, has_type, type_in_words
from megafn.pure.config.problems import Problem, config_error, did_you_mean
from megafn.pure.config.records import TrainConfig
from megafn.pure.schedule import schedule_problems
from megafn.pure.validation.rules import CHOICES, DEAD, RANGES, RULES


def validate(
    config: TrainConfig, world_size: int, *, cuda: bool | None = None
) -> tuple[Problem, ...]:
    """Every reason for which `config` cannot run on `world_size` processes, or () where there is none.

    In three passes: the type of each field, then its range, then the rules between fields. A rule is applied where
    all it reads has passed the first two, so that each problem is told where it is. A field that would have no effect
    is a problem too: nothing that is set is ignored.

    Pure: no file is looked at, and whatever the fields hold, it never raises. `cuda` says whether the devices are
    CUDA's; None leaves unjudged what hangs on that.

    >>> from megafn.pure.config.records import ModelConfig, ParallelConfig
    >>> model = ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> config = TrainConfig(model=model, parallel=ParallelConfig(tp=2), micro_batch_size=1, global_batch_size=4, train_iters=9)
    >>> validate(config, world_size=4)
    ()
    >>> print(*validate(config, world_size=3))
    world_size = 3: tp * pp * cp = 2 must divide it; start a multiple of 2 processes or change tp, pp or cp
    """
    if not isinstance(config, TrainConfig):
        return (Problem("config", config, "give a TrainConfig"),)
    fields = (*all_fields(config), ("world_size", world_size, int))
    problems = [
        Problem(path, value, f"give {type_in_words(kind)}")
        for path, value, kind in fields
        if not has_type(value, kind)
    ]
    ill_typed = {problem.field for problem in problems}
    values = {path: value for path, value, _ in fields if path not in ill_typed}

    given = {path: value for path, value in values.items() if value is not None}
    problems += [
        Problem(
            path, given[path], f"choose one of {', '.join(names)}{did_you_mean(given[path], names)}"
        )
        for path, names in CHOICES.items()
        if path in given and given[path] not in names
    ]
    problems += [
        Problem(path, given[path], remedy)
        for paths, fine, remedy in RANGES
        for path in paths.split()
        if path in given and not fine(given[path])
    ]
    wrong = {problem.field for problem in problems}

    sound = {"cuda": cuda} | {path: value for path, value in values.items() if path not in wrong}
    for paths, rule in RULES:
        path, *others = paths.split()
        if sound.keys() >= {path, *others} and (
            remedy := rule(*(sound[read] for read in (path, *others)))
        ):
            problems.append(Problem(path, sound[path], remedy))
    for paths, reader, alive in DEAD:
        for path in paths.split():
            if (
                sound.keys() >= {path, reader}
                and sound[reader] not in alive
                and sound[path] != _default(config, path)
            ):
                problems.append(
                    Problem(
                        path,
                        sound[path],
                        f"it has no effect where {reader} is {sound[reader]!r}; leave it out "
                        f"or set {reader} to {' or '.join(alive)}",
                    )
                )
    if "global_batch_size" in sound and not any(
        path.startswith(("schedule", "train_")) for path in ill_typed
    ):
        problems += [
            Problem(*problem) for problem in schedule_problems(config) if problem[0] not in wrong
        ]
    return tuple(problems)


def check(config: TrainConfig, world_size: int, *, cuda: bool | None = None) -> None:
    """Raises ConfigError with all that `validate` finds, one problem a line.

    >>> from megafn.pure.config.records import ModelConfig
    >>> model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> check(TrainConfig(model=model, micro_batch_size=2, global_batch_size=5, train_iters=9), world_size=1)
    Traceback (most recent call last):
    megafn.pure.config.problems.ConfigError: global_batch_size = 5: micro_batch_size * dp = 2 * 1 must divide it; choose a multiple of 2
    """
    if problems := validate(config, world_size, cuda=cuda):
        raise config_error(problems)


def _default(config: TrainConfig, path: str) -> object:
    section, name = path.split(".")
    return getattr(attrs.fields(type(getattr(config, section))), name).default
