"""What a model's weights take on a GPU, by arithmetic on its configuration.

It counts the matrices of a decoder: attention (grouped, or DeepSeek's multi-head latent attention), dense and expert
MLPs with three matrices each, embeddings. Norms and biases are left out: they are below a thousandth.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_a2a.recipes.models import Model
from moe_a2a.recipes.plan import RecipeError

GIB = float(1 << 30)

#: GPUs by name: GiB of memory that a process can have, and who makes them.
GPUS = {
    "a100-40": (39.0, "nvidia"),
    "a100": (79.0, "nvidia"),
    "h100": (79.0, "nvidia"),
    "h200": (139.0, "nvidia"),
    "b200": (178.0, "nvidia"),
    "mi300x": (191.0, "amd"),
    "mi325x": (255.0, "amd"),
    "mi355x": (287.0, "amd"),
}

#: The most of a GPU's memory that weights may take. The rest holds the KV cache, activations, CUDA graphs and buffers.
WEIGHTS_SHARE = 0.85


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights. `layers` are attention, dense MLPs and shared experts; `experts` the routed ones."""

    embeddings: float
    layers: float
    experts: float
    vision: float

    @property
    def total(self) -> float:
        return self.embeddings + self.layers + self.experts + self.vision


def parameters(model: Model) -> float:
    """Parameters that SGLang loads; a multi-token-prediction layer is not among them. Raises RecipeError."""
    return weights(model, bytes_each=1.0).total


def weights(model: Model, bytes_each: float | None = None) -> Weights:
    """Bytes of the weights; with `bytes_each` the matrices' parameters times that. Raises RecipeError."""
    hidden, layers = model.size("hidden_size"), model.size("num_hidden_layers")
    each = bytes_each if bytes_each is not None else _bytes_of_a_weight(model)
    plain = bytes_each if bytes_each is not None else 2.0
    dense_layers = _dense_layers(model)
    dense = dense_layers * 3 * hidden * model.first("intermediate_size", default=1) if dense_layers else 0
    attention = layers * _attention(model)
    experts = shared = 0
    if model.experts:
        width = model.first("moe_intermediate_size", "intermediate_size", default=1)
        sparse = layers - dense_layers
        experts = sparse * model.experts * 3 * hidden * width
        shared = sparse * (model.count("n_shared_experts") * 3 * hidden * width + hidden * model.experts)
    vocabulary = model.size("vocab_size") * hidden * (1 if model.text.get("tie_word_embeddings") else 2)
    return Weights(
        embeddings=vocabulary * plain,
        layers=(attention + dense + shared) * each,
        experts=experts * each,
        vision=_vision(model) * plain,
    )


def _dense_layers(model: Model) -> int:
    """Layers with a dense MLP instead of experts."""
    layers = model.size("num_hidden_layers")
    if not model.experts:
        return layers
    return min(layers, model.count("first_k_dense_replace"))


def _attention(model: Model) -> int:
    """Parameters of a layer's attention."""
    hidden, heads = model.size("hidden_size"), model.size("num_attention_heads")
    if model.count("kv_lora_rank"):
        latent, rope = model.size("kv_lora_rank"), model.size("qk_rope_head_dim")
        nope, value = model.size("qk_nope_head_dim"), model.size("v_head_dim")
        rank = model.count("q_lora_rank")
        query = heads * (nope + rope)
        queries = rank * (hidden + query) if rank else hidden * query
        return int(queries + hidden * (latent + rope) + latent * heads * (nope + value) + heads * value * hidden)
    width = model.first("head_dim", default=hidden // heads)
    return 2 * hidden * heads * width + 2 * hidden * model.first("num_key_value_heads", default=heads) * width


def _vision(model: Model) -> int:
    """Parameters of a vision encoder, about: attention and an MLP with three matrices a layer, and one merger."""
    config = model.vision
    if config is None:
        return 0

    def size(name: str) -> int:
        return model.whole(f"vision_config {name}", config.get(name) or 0, least=0)

    layers = size("depth") or size("num_hidden_layers")
    hidden, inner = size("hidden_size"), size("intermediate_size")
    merged = hidden * (size("spatial_merge_size") or 1) ** 2
    return layers * (4 * hidden**2 + 3 * hidden * inner) + merged * (merged + size("out_hidden_size"))


def _bytes_of_a_weight(model: Model) -> float:
    config = model.quantization
    if not config:
        return 4.0 if model.text.get("torch_dtype") == "float32" else 2.0
    bits = _quantized(model, "bits") or _quantized(model, "w_bit")
    if bits:  # packed integers, and for each group a scale of two bytes and a zero of `bits`
        grouped = (
            model.size("hidden_size") if config.get("group_size") == -1 else _quantized(model, "group_size") or 128
        )
        return bits / 8 + (2 + bits / 8) / grouped
    return 1.0


def _quantized(model: Model, name: str) -> int:
    """A number of the quantization_config, 0 if it is not there. Raises RecipeError."""
    return model.whole(f"quantization_config {name}", model.quantization.get(name) or 0, least=0)


@dataclass(frozen=True)
class Share:
    """What of a server's weights is on one of its GPUs, in bytes, and how much of its memory that is."""

    weights: float
    memory: float

    @property
    def text(self) -> str:
        return f"{self.weights / GIB:.1f} of {self.memory / GIB:.0f} GiB"


def share(model: Model, gpus: int, memory_gib: float, expert_parallel: bool = False, redundant: int = 0) -> Share:
    """A GPU's share of a server with `gpus` of them. Raises RecipeError if the weights do not fit.

    expert_parallel: experts are spread, and everything else is on every GPU, as with DP attention, --moe-dense-tp-size
        1 and --enable-dp-lm-head. Otherwise everything is cut into `gpus` parts (the vision encoder is not).
    redundant: experts beyond the model's.
    """
    all_weights = weights(model)
    if expert_parallel:
        copies = 1 + redundant / model.experts
        mine = all_weights.embeddings + all_weights.layers + all_weights.experts * copies / gpus + all_weights.vision
    else:
        mine = (all_weights.embeddings + all_weights.layers + all_weights.experts) / gpus + all_weights.vision
    found = Share(mine, memory_gib * GIB)
    if mine > WEIGHTS_SHARE * found.memory:
        extra = f" with {redundant} redundant experts" if redundant else ""
        raise RecipeError(
            f"--model {model.path}: its weights{extra} take {found.text} of each GPU if a server has {gpus}, and at "
            f"most {WEIGHTS_SHARE:.0%} may be weights; give a server more "
            f"GPUs{', fewer failures to survive' if redundant else ''}, or --gpu if yours have more memory"
        )
    return found


def gpu_memory(text: str) -> tuple[float, str]:
    """GiB and maker of --gpu, which is a name or a number of GiB. Raises RecipeError."""
    if text.lower() in GPUS:
        return GPUS[text.lower()]
    try:
        gib = float(text)
    except ValueError:
        gib = 0.0
    if not 1 <= gib <= 10_000:
        raise RecipeError(f"--gpu {text}: not one of {', '.join(GPUS)}; give one of these, or the GiB of its memory")
    return gib, "nvidia"


def check_parts(model: Model, gpus: int) -> None:
    """Heads and columns can be cut into `gpus` parts, as tensor parallelism does. Raises RecipeError."""
    heads = model.size("num_attention_heads")
    key_heads = model.first("num_key_value_heads", default=heads)
    _divides(model, gpus, "attention heads", heads)
    if key_heads % gpus and gpus % key_heads:
        raise RecipeError(
            f"--model {model.path}: {key_heads} key-value heads can be neither cut into {gpus} parts nor copied to "
            f"{gpus} GPUs evenly; give servers a number of GPUs that divides or is a multiple of {key_heads}"
        )
    if not model.experts or _dense_layers(model):
        _columns(model, gpus, "intermediate_size")
    if model.experts:
        name = "moe_intermediate_size" if model.text.get("moe_intermediate_size") else "intermediate_size"
        _columns(model, gpus, name)


def _columns(model: Model, gpus: int, name: str) -> None:
    columns = model.size(name)
    block = _block(model)
    if columns % (gpus * block):
        parts = f"{gpus} parts of whole blocks of {block}" if block > 1 else f"{gpus} equal parts"
        raise RecipeError(
            f"--model {model.path}: {name} {columns} cannot be cut into {parts}; give servers another number of GPUs"
        )


def _block(model: Model) -> int:
    """Columns that have their scale in common; 1 if each has its own. Raises RecipeError."""
    sizes = model.quantization.get("weight_block_size")
    if sizes is not None:
        first = sizes[0] if isinstance(sizes, list) and sizes else sizes
        return model.whole("quantization_config weight_block_size", first, least=1)
    return 1 if model.quantization.get("group_size") == -1 else _quantized(model, "group_size") or 1


def _divides(model: Model, gpus: int, what: str, number: int) -> None:
    if number % gpus:
        fitting = [str(n) for n in range(1, 17) if number % n == 0]
        raise RecipeError(
            f"--model {model.path}: {number} {what} cannot be cut into {gpus} equal parts; give servers "
            f"{', '.join(fitting)} GPUs"
        )
