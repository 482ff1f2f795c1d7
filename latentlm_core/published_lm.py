"""Published language models in our words: Llama, Mistral, Qwen2 and Qwen3.

What their config.json says of the network, and where each of their tensors belongs in a
``LatentLM``. What our backbone cannot represent is refused by the name of its field.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from latentlm_core.config import Config
from latentlm_core.models.transformer import TransformerConfig

Architecture = Literal[
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"
]
ARCHITECTURES: tuple[str, ...] = get_args(Architecture)
"""What can be read, under the names that config.json has for them."""

EMBEDDING = "model.embed_tokens.weight"
"""A row for each token id."""
HEAD = "lm_head.weight"
"""The same, where it is not tied to the embedding."""


def _default_rope(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    plain = dict(value)
    kind = plain.pop("rope_type", plain.pop("type", "default"))
    if kind != "default":
        raise ValueError('only rope_type "default" is supported, positions that are not scaled')
    return plain


class RopeParameters(Config):
    """What config.json says of rotary positions, its kind apart."""

    rope_theta: Annotated[float, Field(ge=1, le=1e12)] | None = None
    """Base wavelength."""
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] | None = None
    """Share of a head that is turned."""


Width = Annotated[int, Field(ge=1, le=1 << 20)]
Count = Annotated[int, Field(ge=1, le=1024)]
Rope = Annotated[RopeParameters | None, BeforeValidator(_default_rope)]


class PublishedLMConfig(Config):
    """What of a config.json decides the network, as far as ours go."""

    architecture: Architecture
    """The only one of `architectures`."""
    vocab_size: Annotated[int, Field(ge=1, le=1 << 24)]
    """Rows of the embedding; it may have more than the tokenizer has ids."""
    hidden_size: Width
    """D."""
    intermediate_size: Width
    """Width of the gated feed-forward."""
    num_hidden_layers: Count
    """Number of blocks."""
    num_attention_heads: Count
    """N."""
    num_key_value_heads: Count | None = None
    """K; none: N."""
    head_dim: Annotated[int, Field(ge=2, le=4096, multiple_of=2)] | None = Field(
        default=None, validate_default=True
    )
    """H; none: D / N."""
    max_position_embeddings: Annotated[int, Field(ge=1)]
    """Longest context that it learned."""
    hidden_act: Literal["silu"] = "silu"
    """Of the feed-forward."""
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    """Added to the mean square in each norm."""
    tie_word_embeddings: bool = False
    """Whether the embedding is the softmax head too."""
    attention_bias: bool = False
    """Of queries, keys, values and outputs; Qwen2 does not ask and has those of the first three."""
    mlp_bias: Literal[False] = False
    """Of the feed-forward."""
    rope_theta: Annotated[float, Field(ge=1, le=1e12)] = 10_000.0
    """Base wavelength of the rotary positions; younger files have it in `rope_parameters`."""
    rope_scaling: Rope = None
    """How positions were stretched."""
    rope_parameters: Rope = None
    """The same and the base wavelength, in younger files."""
    sliding_window: Annotated[int, Field(ge=1)] | None = None
    """How far back Mistral sees; Qwen only where `use_sliding_window`."""
    use_sliding_window: Literal[False] = False
    """Whether layers of Qwen see no further back than that."""
    layer_types: tuple[Literal["full_attention"], ...] | None = None
    """How far back each layer sees."""
    quantization_config: None = None
    """How weights were rounded."""

    @field_validator("num_key_value_heads")
    @classmethod
    def _divides(cls, value: int | None, info: ValidationInfo) -> int | None:
        heads = info.data.get("num_attention_heads")
        if value and heads and heads % value:
            raise ValueError(f"it must divide num_attention_heads {heads}")
        return value

    @field_validator("head_dim")
    @classmethod
    def _is_even(cls, value: int | None, info: ValidationInfo) -> int | None:
        width, heads = info.data.get("hidden_size"), info.data.get("num_attention_heads")
        if value is None and width and heads and width % (2 * heads):
            raise ValueError(f"hidden_size {width} over num_attention_heads {heads} must be even")
        return value

    @field_validator("attention_bias")
    @classmethod
    def _is_off_the_output(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("architecture") != "Qwen2ForCausalLM":
            raise ValueError("outputs of our attention have no bias")
        return value

    @field_validator("sliding_window")
    @classmethod
    def _is_no_window(cls, value: int | None, info: ValidationInfo) -> int | None:
        context = info.data.get("max_position_embeddings")
        is_used = info.data.get("architecture") == "MistralForCausalLM"
        if is_used and value and context and value < context:
            raise ValueError(
                "our attention has no window, so it must not be below max_position_embeddings "
                f"{context}"
            )
        return value

    @property
    def wavelength(self) -> float:
        """The base wavelength, wherever it stands."""
        for part in (self.rope_parameters, self.rope_scaling):
            if part is not None and part.rope_theta is not None:
                return part.rope_theta
        return self.rope_theta

    def ours(self) -> TransformerConfig:
        """The same backbone as we write it."""
        return TransformerConfig(
            hidden_size=self.hidden_size,
            num_layers=self.num_hidden_layers,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads,
            intermediate_size=self.intermediate_size,
            rope_theta=self.wavelength,
            rope_end_inclusive=False,
            norm_eps=self.rms_norm_eps,
            norm_affine=True,
            head_size=self.head_dim,
            qkv_bias=self.architecture == "Qwen2ForCausalLM",
            qk_norm=self.architecture == "Qwen3ForCausalLM",
        )


class Part(NamedTuple):
    """Where a published tensor goes.

    Attributes:
        target: our name.
        shape: of the published tensor.
        start: the first of our rows that it fills.
        is_turned: whether its rows are those of heads that are turned by their position.
    """

    target: str
    shape: tuple[int, ...]
    start: int = 0
    is_turned: bool = False


def expected_tensors(
    config: TransformerConfig, vocab_size: int, tied: bool
) -> dict[str, list[Part]]:
    """What the files must hold, and where in a ``LatentLM`` it goes."""
    table, width = (vocab_size, config.hidden_size), config.hidden_size
    head = Part("text_head.weight", table)
    found = {EMBEDDING: [Part("token_embedding.weight", table)]}
    if tied:
        found[EMBEDDING].append(head)
    else:
        found[HEAD] = [head]
    found["model.norm.weight"] = [Part("text_norm.weight", (width,))]
    for layer in range(config.num_layers):
        for name, part in _block_parts(config):
            whole = part._replace(target=f"backbone.blocks.{layer}.{part.target}")
            found[f"model.layers.{layer}.{name}"] = [whole]
    return found


def _block_parts(config: TransformerConfig) -> Iterator[tuple[str, Part]]:
    width, inner, size = config.hidden_size, config.intermediate_size, config.head_dim
    yield "input_layernorm.weight", Part("attention_norm.weight", (width,))
    start = 0
    for letter, heads in (("q", config.num_heads), ("k", config.kv_heads), ("v", config.kv_heads)):
        name, rows, is_turned = f"self_attn.{letter}_proj", heads * size, letter != "v"
        yield f"{name}.weight", Part("attention.qkv.weight", (rows, width), start, is_turned)
        if config.qkv_bias:
            yield f"{name}.bias", Part("attention.qkv.bias", (rows,), start, is_turned)
        start += rows
    if config.qk_norm:
        for letter, ours in (("q", "query_norm"), ("k", "key_norm")):
            part = Part(f"attention.{ours}.weight", (size,), is_turned=True)
            yield f"self_attn.{letter}_norm.weight", part
    out = (width, config.num_heads * size)
    yield "self_attn.o_proj.weight", Part("attention.out.weight", out)
    yield "post_attention_layernorm.weight", Part("feed_forward_norm.weight", (width,))
    yield "mlp.gate_proj.weight", Part("feed_forward.gate_up.weight", (inner, width))
    yield "mlp.up_proj.weight", Part("feed_forward.gate_up.weight", (inner, width), inner)
    yield "mlp.down_proj.weight", Part("feed_forward.down.weight", (width, inner))
