"""Every tensor, segment and file name of a bundle, once. Knows nothing about what carries them.

Shapes use these letters (all axes but N, K, D, heads and head_dim are dynamic):
B batch, S rows of this call, P rows in the cache before it, R rows after selection, I images in the
call, N visual tokens an image has left, K visual tokens kept, M text rows that go with an image (the longest
sequence's), T positions whose logits are asked for,
D hidden size, V vocabulary.
"""

# vision_encoder
PIXEL_VALUES = "pixel_values"  # [I, 3, H, W]
IMAGE_FEATURES = "image_features"  # [I, N, D], behind the projector

# embed_tokens
INPUT_IDS = "input_ids"  # [B, S] int64
INPUTS_EMBEDS = "inputs_embeds"  # [B, S, D]; also what decoder_0 reads

# decoders
HIDDEN_STATES = "hidden_states"  # [B, S, D]: what selectors and later decoders read
LAST_HIDDEN_STATE = "last_hidden_state"  # [B, S, D]: what a decoder that is not the last one writes
POSITION_IDS = "position_ids"  # [B, S] int64, of the unpruned sequence
ATTENTION_MASK = "attention_mask"  # [B, P + S] int64, 1 = may be attended to
# [B, S] float32: attention of the call's last row to its rows in the segment's last layer, mean over heads
LAST_ROW_ATTENTION = "last_row_attention"  # fastv only
LOGITS_INDEX = "logits_index"  # [B, T] int64, rows of this call that norm and lm_head run on
LOGITS = "logits"  # [B, T, V] float32

# selectors
VISUAL_INDEX = "visual_index"  # [I, N] int64, rows of the flattened [B * S, D] states, ascending
TEXT_INDEX = "text_index"  # [I, M] int64, flat rows of the text in the image's sequence, -1 pads; lvpruning only
ROW_TEMPLATE = "row_template"  # [B, R] int64: e < B * S is that flat row, else kept slot e - B * S of [I * K]
KEPT_HIDDEN_STATES = "kept_hidden_states"  # [B, R, D]
KEPT_POSITION_IDS = "kept_position_ids"  # [B, R] int64
KEPT_INDICES = "kept_indices"  # [I, K] int64 into 0..N-1, ascending
SCORES = "scores"  # [I, N] float32

# axes, as they are named in the graphs and in the manifest
BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past_sequence", "total_sequence"
IMAGES, ROWS, TEXT_ROWS, LOGITS_COUNT = "images", "rows", "text_rows", "logits_count"

VISION_ENCODER = "vision_encoder"
EMBED_TOKENS = "embed_tokens"

MANIFEST_FILE = "tokprune.json"
TOKENIZER_FILE = "tokenizer.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
RECIPE_FILE = "recipe.json"  # int8 and int4 only
MODULES_FILE, MODULES_INFO_FILE = "modules.safetensors", "modules.json"  # lvpruning only: the selectors' weights


def decoder(index: int) -> str:
    """Name of the decoder segment behind ``index`` selections."""
    return f"decoder_{index}"


def select(index: int) -> str:
    """Name of the selector segment of stage ``index``."""
    return f"select_{index}"


def plugin_graph(index: int) -> str:
    """File of the selector of stage ``index`` as a TensorRT plugin runs it, beside the one that needs none."""
    return f"{select(index)}.plugin.onnx"


def past(layer: int, which: str) -> str:
    """Name of a layer's cache input, ``which`` being "key" or "value": [B, heads_kv, P, head_dim]."""
    return f"past_key_values.{layer}.{which}"


def present(layer: int, which: str) -> str:
    """Name of a layer's cache output: [B, heads_kv, P + S, head_dim]."""
    return f"present.{layer}.{which}"


def new(layer: int, which: str) -> str:
    """Name of what TensorRT's engines write instead of a present: the call's own rows, [B, heads_kv, S, head_dim]."""
    return f"new.{layer}.{which}"


def beside_present(present: str) -> tuple[str, str]:
    """The `past` and `new` names that belong to a `present` one."""
    _, layer, which = present.split(".")
    return past(int(layer), which), new(int(layer), which)


def state(layer: int) -> str:
    """Name, within a decoder's graph, of the states that enter ``layer``: [B, S, D]."""
    return f"hidden_states.{layer}"
