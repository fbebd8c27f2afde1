"""Can this config run on so many processes? Every reason why not, before anything is started."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from megafn.pure.config.field_types import all_fields, default_of, has_type, type_problem
from megafn.pure.config.problems import Problem, choice_problem, config_error, did_you_mean
from megafn.pure.config.records import TrainConfig
from megafn.pure.config.rule import Rule
from megafn.pure.families.built_in import BUILT_IN_SPECS, find_spec, own_fields
from megafn.pure.families.family_spec import FamilySpec
from megafn.pure.schedule import schedule_problems
from megafn.pure.validation.rules import CHOICES, DEAD, RANGES, RULES

Values = Mapping[str, Any]  # by dotted path


def validate(
    config: TrainConfig, world_size: int, *, cuda: bool | None = None
) -> tuple[Problem, ...]:
    """Every reason for which `config` cannot run on `world_size` processes, or () if there is none.

    In three passes: the type of each field, then its range, then the rules between fields, of every
    family and of the config's own. A rule is applied if all it reads has passed the first two, so
    that each problem is reported where it is. A field that would have no effect is a problem too:
    nothing that is set is ignored.

    Pure: reads no file, and never raises, whatever values the fields have. cuda: whether the
    devices are CUDA's; None: not known, and rules that depend on it are not applied.

    >>> from megafn.pure.config.records import ModelConfig, ParallelConfig
    >>> model = ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> config = TrainConfig(
    ...     model=model,
    ...     parallel=ParallelConfig(tp=2),
    ...     micro_batch_size=1,
    ...     global_batch_size=4,
    ...     train_iters=9,
    ... )
    >>> validate(config, world_size=4)
    ()
    >>> print(*validate(config, world_size=3))  # doctest: +ELLIPSIS
    world_size = 3: tp * pp * cp = 2 must divide it; start a multiple of 2 processes or change ...
    """
    return _problems(config, world_size, cuda, frozenset())


def problems_in_any_layout(
    config: TrainConfig, world_size: int, searched: Collection[str]
) -> tuple[Problem, ...]:
    """Those problems of `validate` that no choice of the fields `searched` would change.

    Each field must have the right type and lie in its range, those of `searched` too; only the
    rules that read one of these are left out. Pure, and never raises.

    >>> from megafn.pure.config.records import ModelConfig, ParallelConfig
    >>> model = ModelConfig(num_layers=4, hidden_size=63, num_attention_heads=4, seq_length=32)
    >>> config = TrainConfig(
    ...     model=model,
    ...     parallel=ParallelConfig(tp=3),
    ...     micro_batch_size=1,
    ...     global_batch_size=4,
    ...     train_iters=9,
    ... )
    >>> [problem.field for problem in validate(config, world_size=3)]
    ['model.num_attention_heads', 'model.hidden_size']
    >>> [problem.field for problem in problems_in_any_layout(config, 3, {"parallel.tp"})]
    ['model.hidden_size']
    """
    return _problems(config, world_size, None, frozenset(searched))


def rules_of(config: TrainConfig) -> tuple[Rule, ...]:
    """The rules between fields that a config must satisfy: those of all families and its own."""
    return _with_rules_of(find_spec(config.model.family))


def _with_rules_of(family: FamilySpec | None) -> tuple[Rule, ...]:
    return RULES if family is None else (*RULES, *family.rules)


def _problems(
    config: TrainConfig, world_size: int, cuda: bool | None, searched: frozenset[str]
) -> tuple[Problem, ...]:
    """All problems, apart from those of rules that read one of the fields `searched`."""
    if not isinstance(config, TrainConfig):
        return (Problem("config", config, "give a TrainConfig"),)

    fields = (*all_fields(config), ("world_size", world_size, int))
    problems = list(_type_problems(fields))
    ill_typed = {problem.field for problem in problems}
    values = {path: value for path, value, _ in fields if path not in ill_typed}

    given = {path: value for path, value in values.items() if value is not None}
    problems += _choice_problems(given)
    problems += _range_problems(given)
    wrong = {problem.field for problem in problems}

    sound = {path: value for path, value in values.items() if path not in wrong}
    family = find_spec(sound.get("model.family"))
    rules = [rule for rule in _with_rules_of(family) if searched.isdisjoint(rule.fields)]
    problems += _rule_problems(rules, {"cuda": cuda, **sound})
    problems += _effect_problems(config, sound)
    if family is not None:
        problems += _family_effect_problems(config, sound, family)

    if "global_batch_size" in sound and not _concern_the_schedule(ill_typed):
        problems += [problem for problem in schedule_problems(config) if problem.field not in wrong]
    return tuple(problems)


def check(config: TrainConfig, world_size: int, *, cuda: bool | None = None) -> None:
    """Raises ConfigError with all that `validate` finds, one problem a line.

    >>> from megafn.pure.config.records import ModelConfig
    >>> model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> config = TrainConfig(model=model, micro_batch_size=2, global_batch_size=5, train_iters=9)
    >>> check(config, world_size=1)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    megafn.pure.config.problems.ConfigError: global_batch_size = 5: micro_batch_size * dp = ...
    """
    problems = validate(config, world_size, cuda=cuda)
    if problems:
        raise config_error(problems)


def _type_problems(fields: tuple[tuple[str, Any, Any], ...]) -> Iterator[Problem]:
    for path, value, kind in fields:
        if not has_type(value, kind):
            yield type_problem(path, value, kind)


def _choice_problems(given: Values) -> Iterator[Problem]:
    """Strings that are none of their choices, and families that are none."""
    family = given.get("model.family")
    if family is not None and find_spec(family) is None:
        names = ", ".join(BUILT_IN_SPECS)
        nearest = did_you_mean(family, BUILT_IN_SPECS) if isinstance(family, str) else ""
        yield Problem(
            "model.family", family, f"choose one of {names}, or give a megafn.Family{nearest}"
        )
    for path, choices in CHOICES.items():
        value = given.get(path)
        if value is not None and value not in choices:
            yield choice_problem(path, value, choices)


def _range_problems(given: Values) -> Iterator[Problem]:
    for paths, in_range, remedy in RANGES:
        for path in paths.split():
            if path in given and not in_range(given[path]):
                yield Problem(path, given[path], remedy)


def _rule_problems(rules: Iterable[Rule], sound: Values) -> Iterator[Problem]:
    for rule in rules:
        if not sound.keys() >= set(rule.fields):
            continue
        values = [sound[path] for path in rule.fields]
        remedy = rule.remedy(*values)
        if remedy:
            yield Problem(rule.fields[0], values[0], remedy)


def _effect_problems(config: TrainConfig, sound: Values) -> Iterator[Problem]:
    """Fields that are set although the value of another one leaves them without effect."""
    for paths, decider, needed in DEAD:
        if decider not in sound or sound[decider] in needed:
            continue
        for path in paths.split():
            if path in sound and sound[path] != _default(config, path):
                yield _no_effect(path, sound[path], decider, sound[decider], needed)


def _family_effect_problems(
    config: TrainConfig, sound: Values, family: FamilySpec
) -> Iterator[Problem]:
    """Fields that are set although the config's family does not read them."""
    for path, readers in own_fields().items():
        if path in family.fields or path not in sound:
            continue
        if sound[path] != _default(config, path):
            yield _no_effect(path, sound[path], "model.family", family.name, readers)


def _no_effect(
    path: str, value: Any, decider: str, setting: Any, needed: tuple[str, ...]
) -> Problem:
    return Problem(
        path,
        value,
        f"has no effect with {decider} = {setting!r}; "
        f"leave it out or set {decider} to {' or '.join(needed)}",
    )


def _concern_the_schedule(paths: set[str]) -> bool:
    return any(path.startswith(("schedule", "train_")) for path in paths)


def _default(config: TrainConfig, path: str) -> object:
    section, name = path.split(".")
    return default_of(type(getattr(config, section)), name)
