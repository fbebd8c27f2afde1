"""What a run remembers of the weights that it started from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from attrs import frozen


@frozen(kw_only=True)
class Pretrained:
    """Where a run's first weights came from, and what is written back beside its own.

    source: the absolute path; fingerprint: of the content at it.
    architecture: "LlamaForCausalLM" and so on, as config.json names it; None: the weights did not
        come from a Hugging Face directory.
    dtype: of the stored weights: "fp32", "bf16" or "fp16".
    config: config.json of the directory, of which an export gives back what is not the model's;
        None as for `architecture`.
    """

    source: str
    fingerprint: str
    architecture: str | None = None
    dtype: str = "fp32"
    config: Mapping[str, Any] | None = None


def pretrained_to_dict(pretrained: Pretrained | None) -> dict[str, Any] | None:
    """For the manifest of a checkpoint."""
    return None if pretrained is None else attrs.asdict(pretrained)


def pretrained_from_dict(stored: Mapping[str, Any] | None) -> Pretrained | None:
    """The inverse of `pretrained_to_dict`; keys that this version does not know are left out.

    >>> record = Pretrained(source="/models/tiny", fingerprint="1f", config={"eos_token_id": 2})
    >>> pretrained_from_dict(pretrained_to_dict(record)) == record
    True
    """
    if stored is None:
        return None
    known = attrs.fields_dict(Pretrained)
    return Pretrained(**{name: value for name, value in stored.items() if name in known})
