"""Settings of single starts, with the names and defaults of Hugging Face's PEFT."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from peft_core.errors import ConfigError


class StartConfig(BaseModel):
    """Base of these: frozen, and strict about types and names. Raises `ConfigError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            lines = [f"  {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False)]
            raise ConfigError(f"{type(self).__name__}:\n" + "\n".join(lines)) from None

    # As in `AdapterConfig`: pydantic need not call it where one is inside another.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


class EvaConfig(StartConfig):
    """EVA (see `peft_lora.starts.eva`).

    Args:
        rho: a layer gets at most rho · r directions, at least 1. With 1 every layer keeps its rank.
        tau: the components have settled when each one's cosine with what it was a batch ago is above this.
        use_label_mask: leave out positions whose label is `label_mask_value`, where the batches have labels.
        label_mask_value: see there.
        whiten: divide each direction by the root of its singular value.
        adjust_scaling_factors: let alpha follow the rank, so that s is what it would have been.
    """

    rho: float = Field(default=2.0, ge=1.0)
    tau: float = Field(default=0.99, ge=0.0, le=1.0)
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True


class CordaConfig(StartConfig):
    """CorDA (see `peft_lora.starts.corda`).

    Args:
        corda_method: "ipm" adapts the directions that matter most for the batches, "kpm" those that matter least.
        covariance_file: a safetensors file with the inputs' covariances: read where it is there, and written where it
            is not. Reading it, no batch is looked at (`calibration=[]` will do).
        cache_file: refused: it would be a pickle of what `covariance_file` leads to in seconds.
        verbose, prune_temporary_fields: without effect; kept for configs of other writers.
        use_float16_for_covariance: refused: sums of squares overflow there.
    """

    corda_method: Literal["ipm", "kpm"] = "ipm"
    covariance_file: str | None = None
    cache_file: str | None = None
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    @field_validator("cache_file")
    @classmethod
    def _no_cache(cls, value: str | None) -> str | None:
        if value is not None:
            raise ValueError("not supported; covariance_file keeps what took the data, as safetensors")
        return value

    @field_validator("use_float16_for_covariance")
    @classmethod
    def _no_float16(cls, value: bool) -> bool:
        if value:
            raise ValueError("sums of squares overflow in float16; leave it False")
        return value

    @field_validator("covariance_file")
    @classmethod
    def _safetensors(cls, value: str | None) -> str | None:
        if value is not None and not value.endswith(".safetensors"):
            raise ValueError("give the name of a .safetensors file; pickles are neither read nor written")
        return value


class LoraGAConfig(StartConfig):
    """LoRA-GA (see `peft_lora.starts.lora_ga`).

    Args:
        direction: which singular vectors of the gradient A and B take.
        scale: how long they are.
        stable_gamma: γ of the scale "stable".
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = Field(default=16, ge=1)


class LoftQConfig(StartConfig):
    """LoftQ, as in configs of other writers. Here the base is never quantised: see `replace_lora_weights_loftq`."""

    loftq_bits: Literal[2, 4, 8] = 4
    loftq_iter: int = Field(default=1, ge=1)
