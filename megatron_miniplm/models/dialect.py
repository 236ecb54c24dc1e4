"""A maker of Llama-shaped families: one is told from another by what its config.json says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_miniplm.models.decoder import (
    IGNORED_TENSORS,
    TIED_COPIES,
    decoder_rules,
    read_config,
    refuse_sliding_layers,
    require,
    write_config,
)
from megatron_miniplm.models.family import ModelConfig, ModelFamily
from megatron_miniplm.models.mapping import Rule
from megatron_miniplm.models.transformer import TRANSFORMER


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How one family says in config.json what the layers of all have, and what it always has."""

    name: str
    """Of the family."""
    architecture: str
    """``architectures``."""
    model_type: str
    """``model_type``."""
    always: Mapping[str, bool]
    """Fields of `ModelConfig` that are so in every model: q, k, v biases and q, k norms."""
    defaults: Mapping[str, Any]
    """What transformers assumes where config.json is silent."""
    fixed: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Fields with the only values that this program honours."""
    ignored: Sequence[str] = ()
    """Fields without effect, or checked by `check_fields`; ``layer_types`` is always checked."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """What config.json says beside that which all families say."""
    check_fields: Callable[[Mapping[str, Any], ModelConfig], None] = lambda raw, config: None
    """Refuses more of a config.json and the shape that it describes."""
    check_shape: Callable[[ModelConfig], None] = lambda config: None
    """Refuses more shapes, which config.json cannot say."""

    def config_from_hf(self, raw: Mapping[str, Any]) -> ModelConfig:
        """config.json -> shape; refuses every field that it does not know."""
        refuse_sliding_layers(raw)
        config = read_config(
            raw, self.name, model_type=self.model_type, defaults=self.defaults, fixed=self.fixed,
            ignored=self.ignored, **self.always,
        )  # fmt: skip
        self.check_fields(raw, config)
        return config

    def config_to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """Shape -> config.json; refuses what this family does not have."""
        self._check(config)
        said = write_config(config, architecture=self.architecture, model_type=self.model_type)
        return {**said, **self.written}

    def rules(self, config: ModelConfig) -> Sequence[Rule]:
        """Parameter table of that shape."""
        self._check(config)
        return decoder_rules(config)

    def family(self, **more: Any) -> ModelFamily:
        """The family that speaks it; `more` are further fields of `ModelFamily`."""
        return ModelFamily(
            name=self.name,
            architecture=TRANSFORMER,
            architectures=(self.architecture,),
            config_from_hf=self.config_from_hf,
            config_to_hf=self.config_to_hf,
            rules=self.rules,
            tied_copies=TIED_COPIES,
            ignored_tensors=IGNORED_TENSORS,
            **more,
        )

    def _check(self, config: ModelConfig) -> None:
        require(config, **self.always)
        self.check_shape(config)
