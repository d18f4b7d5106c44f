"""What a checkpoint's config.json says, checked to the last key.

A model file computes one thing. A config can ask for many others under keys that look like decoration, and an engine that skips
what it does not know answers wrongly without a word. So every key is accounted for: read, required to have the one value that
the model was written for, or listed as harmless; all other keys and values are refused by name, all of them in one message.
No tensors here: a dry run reads configs too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pointsman.moe.spec import RoutingSpec

MOST_LAYERS = 1024
MOST_EXPERTS = 1 << 16  # what a routing record can name

# who wrote it, what its tokens are called, how it was trained: nothing that inference computes with
HARMLESS = frozenset(
    {"architectures", "auto_map", "transformers_version", "_name_or_path", "torchscript", "use_cache", "return_dict"}
    | {"bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type", "chunk_size_feed_forward"}
    | {"initializer_range", "attention_dropout", "router_aux_loss_coef", "router_jitter_noise"}
    | {"output_router_logits", "output_attentions", "output_hidden_states"}
)
QUANTIZATION_HARMLESS = frozenset({"quant_method", "fmt", "activation_scheme", "weight_block_size", "dequantize"})
QUANTIZATION_HARMLESS |= {"version", "global_compression_ratio"}
COMPRESSED_HARMLESS = frozenset({"observer", "observer_kwargs", "actorder", "scale_dtype", "zp_dtype"})  # how scales were found and kept
KERNEL_BLOCK = (128, 128)
NEVER_QUANTIZED = frozenset({"gate", "e_score_correction_bias", "lm_head", "embed_tokens", "norm"})


class ConfigReader:
    """Reads keys of a config, remembers which, and collects what is wrong with them.

    Args:
        fixed: keys with the values that the model is written for, as for `only`.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        fixed: Mapping[str, tuple[Any, ...]] | None = None,
        harmless: frozenset[str] = HARMLESS,
        prefix: str = "",
    ) -> None:
        self.config = config
        self.problems: list[str] = []
        self._harmless = harmless
        self._prefix = prefix
        self._read: set[str] = set()
        for key, right in (fixed or {}).items():
            self.only(key, *right)

    def refuse(self, key: str, right: str) -> None:
        """Note that a key's value cannot be served, and what would be right."""
        self.problems.append(f"{self._prefix}{key} is {self.config.get(key)!r:.200}; {right}")

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is; a missing key and null are alike."""
        self._read.add(key)
        value = self.config.get(key)
        return default if value is None else value

    def only(self, key: str, *right: Any) -> None:
        """The key must be missing, null, or have one of these values."""
        value = self.get(key)
        if value is not None and not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in right):
            self.refuse(key, f"this model is written for {' or '.join(map(repr, right)) or 'null'}")

    def whole(self, *keys: str, low: int = 1, high: int = 1 << 31, default: int | None = None) -> int:
        """A whole number under any one of these names; under several, they must agree."""
        given = {key: self.get(key) for key in keys if self.get(key) is not None}
        for key, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                self.refuse(key, f"it must be a whole number from {low} to {high}")
                return low
        if len(set(given.values())) > 1:
            self.refuse(next(iter(given)), f"but {', '.join(f'{key} is {value}' for key, value in list(given.items())[1:])}")
        if not given and default is None:
            self.problems.append(f"{self._prefix}{keys[0]} is missing")
        return next(iter(given.values()), low if default is None else default)

    def real(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.get(key, default)
        if value is None:
            self.problems.append(f"{self._prefix}{key} is missing")
            return 1.0
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            self.refuse(key, "it must be a positive number")
            return 1.0
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        self.only(key, True, False)
        return self.get(key, default) is True

    def agreed(self, what: str, given: Mapping[str, float], default: float) -> float:
        """The one value that several keys give for the same thing."""
        if len(set(given.values())) > 1:
            self.problems.append(f"{what} disagree: {', '.join(f'{key} makes {value:g}' for key, value in given.items())}")
        return next(iter(given.values()), default)

    def section(self, key: str, harmless: frozenset[str] = frozenset()) -> ConfigReader | None:
        """A reader of a nested object, or None where there is none; `join` brings its problems back."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.refuse(key, "it must be an object")
            return None
        return ConfigReader(value, harmless=harmless, prefix=f"{self._prefix}{key}.")

    def join(self, section: ConfigReader) -> None:
        """Take over the problems of a section, its unknown keys included."""
        section.note_unknown()
        self.problems += section.problems

    def note_unknown(self) -> None:
        """Refuse the keys that nobody read and that are not known to be harmless."""
        for key in sorted(self.config.keys() - self._read - self._harmless):
            self.refuse(key, "this version does not know the key, and it may change what the model computes")

    def finish(self) -> None:
        """Raise ValueError with all problems, unknown keys included."""
        self.note_unknown()
        if self.problems:
            raise ValueError(f"config.json asks for what this version cannot serve: {'; '.join(self.problems)}")


def read_sizes(reader: ConfigReader, *, head_dim: int | None = None) -> dict[str, Any]:
    """What all models' configs say by the same names, as arguments of `Architecture`; heads are hidden / heads wide unless told."""
    num_heads, num_kv_heads = reader.whole("num_attention_heads"), reader.whole("num_key_value_heads")
    if num_heads % num_kv_heads:
        reader.refuse("num_attention_heads", f"it must be a multiple of num_key_value_heads ({num_kv_heads})")
    hidden_size, num_layers = reader.whole("hidden_size"), reader.whole("num_hidden_layers", high=MOST_LAYERS)
    reader.only("layer_types", ["full_attention"] * num_layers)
    return {
        "vocab_size": reader.whole("vocab_size"),
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": reader.whole("head_dim", default=max(1, hidden_size // num_heads)) if head_dim is None else head_dim,
        "max_positions": reader.whole("max_position_embeddings"),
        "norm_epsilon": reader.real("rms_norm_eps"),
        **read_quantization(reader),
        "dtype": read_dtype(reader),
    }


def read_routing(reader: ConfigReader, num_experts: int, score: Literal["softmax", "sigmoid"], **values: Any) -> RoutingSpec:
    """How a model routes to `num_experts_per_tok` experts; `values` are those of `RoutingSpec`."""
    top_k = reader.whole("num_experts_per_tok")
    if top_k > num_experts:
        reader.refuse("num_experts_per_tok", f"it must be at most the number of experts ({num_experts})")
        top_k = num_experts
    try:
        return RoutingSpec(num_experts=num_experts, top_k=top_k, score=score, **values)
    except ValueError as error:
        reader.problems.append(str(error))
        return RoutingSpec(num_experts=num_experts, top_k=top_k, score=score)


def read_rotary(reader: ConfigReader, head_dim: int, default_theta: float, default_factor: float = 1.0) -> tuple[int, float]:
    """Rotated channels and theta, from `rotary_dim` and `rope_theta` or from transformers 5's `rope_parameters`."""
    reader.only("rope_scaling", {"type": "default"}, {"rope_type": "default"})
    channels: dict[str, float] = {}
    thetas: dict[str, float] = {}
    if reader.get("rotary_dim") is not None:
        channels["rotary_dim"] = reader.whole("rotary_dim", low=2, high=head_dim)
    rope = reader.section("rope_parameters")
    for section, prefix in ((reader, ""), (rope, "rope_parameters.")):
        if section is not None and section.get("partial_rotary_factor") is not None:
            channels[prefix + "partial_rotary_factor"] = round(section.real("partial_rotary_factor") * head_dim, 6)
        if section is not None and section.get("rope_theta") is not None:
            thetas[prefix + "rope_theta"] = section.real("rope_theta")
    if rope is not None:
        rope.only("rope_type", "default")
        rope.only("type", "default")
        reader.join(rope)
    rotary_dim = reader.agreed("rotary channels", channels, default_factor * head_dim)
    if rotary_dim != round(rotary_dim) or rotary_dim % 2 or not 2 <= rotary_dim <= head_dim:
        where = next(iter(channels), "head_dim")
        reader.problems.append(f"{where} makes {rotary_dim:g} rotary channels; it must be an even number from 2 to head_dim ({head_dim})")
    return round(rotary_dim), reader.agreed("rope_theta", thetas, default_theta)


def read_quantization(reader: ConfigReader) -> dict[str, Any]:
    """How matrices are quantized, as arguments of `Architecture`: in FP8 with a scale for each block, with one for each matrix, or not.

    Other quantizations are refused.
    """
    plain = {"quantization_block": None, "scalar_scales": False, "input_scales": False}
    section = reader.section("quantization_config", QUANTIZATION_HARMLESS)
    if section is None:
        return plain
    method = section.get("quant_method")
    if method not in ("fp8", "compressed-tensors", "modelopt"):
        right = "this version reads 'fp8', 'compressed-tensors' and 'modelopt' with one e4m3 scale a matrix, and plain checkpoints"
        section.refuse("quant_method", right)
        reader.problems += section.problems
        return plain
    found = _read_fp8(section) if method == "fp8" else _read_compressed(section)
    if section.get("kv_cache_scheme") is not None:
        section.refuse("kv_cache_scheme", "keys and values have scale 1 here, whatever they are stored as")
    for key in ("modules_to_not_convert", "ignored_layers", "ignore"):
        left = section.get(key, [])
        if not isinstance(left, list) or not all(_never_quantized(str(module)) for module in left):
            section.refuse(key, f"this version leaves only {', '.join(sorted(NEVER_QUANTIZED))} unquantized")
    reader.join(section)
    return found


def _read_fp8(section: ConfigReader) -> dict[str, Any]:
    section.only("fmt", "float8_e4m3fn", "e4m3")
    section.only("scale_fmt", "float")
    section.only("expert_dtype", "fp8")
    section.only("modules_to_convert")
    block, static = section.get("weight_block_size"), section.get("activation_scheme") == "static"
    section.only("activation_scheme", "dynamic", "static")
    if block is None:
        return _scalar(static)
    if static:
        section.refuse("activation_scheme", "of FP8 in blocks it must be 'dynamic'; with one scale a matrix weight_block_size is null")
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        section.refuse("weight_block_size", "it must be two whole numbers, rows and columns of a block, such as [128, 128]")
        block = KERNEL_BLOCK
    return {"quantization_block": (block[0], block[1]), "scalar_scales": False, "input_scales": False}


def _read_compressed(section: ConfigReader) -> dict[str, Any]:
    """What llm-compressor and ModelOpt write: one group of all linears, of which weights and what they multiply are described apart."""
    if section.get("quant_method") == "modelopt":
        section.only("quant_algo", "FP8")
        section.get("producer")  # who wrote it
    section.only("format", "float-quantized")
    section.only("quantization_status", "compressed", "frozen")
    section.only("sparsity_config", {})
    section.only("transform_config", {})
    for key in ("fmt", "activation_scheme", "weight_block_size"):  # the words of quant_method fp8
        section.only(key)
    static = False
    groups = section.section("config_groups")
    names = [] if groups is None else list(groups.config)
    group = groups.section(names[0]) if groups is not None and len(names) == 1 else None
    if groups is None or group is None:
        section.refuse("config_groups", "it must have one group, of all linears")
        return _scalar(static)
    group.only("targets", ["Linear"])
    group.only("format", "float-quantized")
    group.only("output_activations")
    for name in ("weights", "input_activations"):
        part = group.section(name, COMPRESSED_HARMLESS)
        if part is None:
            group.problems.append(f"quantization_config.config_groups.{names[0]}.{name} is missing")
            continue
        for key, right in (("num_bits", (8,)), ("type", ("float",)), ("symmetric", (True,)), ("group_size", ()), ("block_structure", ())):
            part.only(key, *right)
        if name == "weights":
            part.only("strategy", "tensor")  # one for each row, or block, is another form
            part.only("dynamic", False)
        else:
            static = not part.flag("dynamic", False)
            part.only("strategy", *(("tensor",) if static else ("tensor", "token")))
        group.join(part)
    groups.join(group)
    section.join(groups)
    return _scalar(static)


def _scalar(static: bool) -> dict[str, Any]:
    """One scale a matrix: the scale of each of its blocks, of the size that kernels take."""
    return {"quantization_block": KERNEL_BLOCK, "scalar_scales": True, "input_scales": static}


def _never_quantized(module: str) -> bool:
    """Whether a module name, such as `gate`, `model.layers.0.mlp.gate` or `re:.*lm_head$`, ends in one that is never quantized."""
    last = module.removesuffix(".weight").rsplit(".", 1)[-1].strip("*$")
    return last in NEVER_QUANTIZED or last.endswith("norm")


def read_dtype(reader: ConfigReader) -> str:
    """Type of the plain weights: `dtype` as transformers 5 writes it, or `torch_dtype`."""
    for key in ("torch_dtype", "dtype"):
        reader.only(key, "bfloat16", "float32")
    return str(reader.get("dtype", reader.get("torch_dtype", "bfloat16")))
