"""Make `tests/references`: tiny random Gemma 1, 2, 3 and 4 in Hugging Face's form, and what transformers computes with them.

    python tests/make_references.py        (needs torch and transformers; a few seconds)

A folder holds config.json as transformers 5 writes it, config_v4.json (the same model in the words of transformers 4, as on
the Hub), model.safetensors (float32), and reference.npz, computed in float32 with eager attention:

    tokens, lengths      three rows, right-padded; the first is full, three windows long and more
    left, right          logits of every real token, row after row, of the batch padded on that side
    alone                logits of the first row by itself, nothing padded
    gradient/NAME        Gemma 4: the gradient of the first row's mean cross-entropy by each weight

Norm weights are random (fresh ones are 0, which hides a missing 1 + w; in Gemma 4 they are 1) and soft-caps are low enough to
bite.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

REFERENCES = Path(__file__).parent / "references"
LENGTHS, WINDOW, VOCABULARY = (26, 14, 5), 8, 64
BASE = dict(
    vocab_size=VOCABULARY, hidden_size=40, intermediate_size=48, head_dim=12, max_position_embeddings=64, rms_norm_eps=1e-6,
    pad_token_id=0, eos_token_id=1, bos_token_id=2,
)  # fmt: skip
WINDOWED = dict(sliding_window=WINDOW, query_pre_attn_scalar=24)
CAPPED = dict(attn_logit_softcapping=1.0, final_logit_softcapping=3.0)
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}


def gemma3(layers: int, pattern: int, rope: dict) -> dict:
    """Fields of a Gemma 3 whose every `pattern`-th layer sees everything."""
    local = {"rope_type": "default", "rope_theta": 90.0}
    return WINDOWED | {
        "num_hidden_layers": layers,
        "layer_types": ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)],
        "rope_parameters": {"full_attention": {"rope_theta": 500.0, **rope}, "sliding_attention": local},
    }


def heads(query: int, key: int) -> dict:
    return {"num_attention_heads": query, "num_key_value_heads": key}


VARIANTS = {  # name -> class of transformers, and what differs from BASE
    "gemma1-mqa": ("Gemma", heads(4, 1) | {"num_hidden_layers": 2, "rope_parameters": ROPE}),
    "gemma1-mha": ("Gemma", heads(4, 4) | {"num_hidden_layers": 2, "rope_parameters": ROPE}),
    "gemma2-gqa": ("Gemma2", heads(4, 2) | {"num_hidden_layers": 3, "rope_parameters": ROPE} | WINDOWED | CAPPED),
    "gemma2-mqa": ("Gemma2", heads(2, 1) | {"num_hidden_layers": 2, "rope_parameters": ROPE} | WINDOWED | CAPPED),
    "gemma3-gqa": ("Gemma3Text", heads(4, 2) | gemma3(4, 3, {"rope_type": "default"})),
    "gemma3-linear": ("Gemma3Text", heads(4, 1) | gemma3(3, 2, {"rope_type": "linear", "factor": 8.0})),
}


def gemma4(layers: int, pattern: int, **fields) -> dict:
    """Fields of a Gemma 4 whose every `pattern`-th layer sees everything, with heads twice as large."""
    return {
        "num_hidden_layers": layers, "num_attention_heads": 4, "head_dim": 8, "global_head_dim": 16, "sliding_window": WINDOW,
        "vocab_size_per_layer_input": VOCABULARY, "final_logit_softcapping": 3.0,
        "layer_types": ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)],
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 90.0},
        },
    } | fields  # fmt: skip


GEMMA4 = {
    # twice two local layers and a global one, then twice the same that share keys and values, with a wider MLP
    "gemma4-e2b": gemma4(
        12, 3, num_key_value_heads=1, num_kv_shared_layers=6, use_double_wide_mlp=True, hidden_size_per_layer_input=24
    ),
    # no period but the whole: local, global, global, local, global, and one of each that share
    "gemma4-e4b": gemma4(
        7, 3, num_key_value_heads=2, num_kv_shared_layers=2, hidden_size_per_layer_input=24,
        layer_types=[f"{kind}_attention" for kind in ("sliding", "full", "full", "sliding", "full", "sliding", "full")],
    ),
    # the values of global layers are their keys, of which there are fewer
    "gemma4-12b": gemma4(
        6, 3, num_key_value_heads=2, num_global_key_value_heads=1, attention_k_eq_v=True, hidden_size_per_layer_input=0
    ),
}  # fmt: skip


def older_dialect(values: dict) -> dict:
    """A config.json of transformers 5 in the words of transformers 4, as the Hub holds them."""
    if values["model_type"] == "gemma4_text":
        of_global = next(iter(values["per_layer_config"].values()))
        kept = {key: value for key, value in values.items() if key != "per_layer_config"}
        return kept | {
            "global_head_dim": of_global["head_dim"],
            "num_global_key_value_heads": of_global.get("num_key_value_heads"),
        }
    new = {"rope_parameters", "layer_types", "dtype", "_sliding_window_pattern", "transformers_version"}
    old = {key: value for key, value in values.items() if key not in new} | {"torch_dtype": "float32"}
    rope = values["rope_parameters"]
    if values["model_type"] == "gemma":  # "gelu" has always meant the tanh form here
        return old | {"hidden_act": "gelu", "hidden_activation": None, "rope_scaling": None, "rope_theta": rope["rope_theta"]}
    if values["model_type"] == "gemma2":
        return old | {"hidden_act": "gelu_pytorch_tanh", "rope_theta": rope["rope_theta"]}
    full = dict(rope["full_attention"])
    return old | {
        "rope_theta": full.pop("rope_theta"),
        "rope_local_base_freq": rope["sliding_attention"]["rope_theta"],
        "rope_scaling": full if full["rope_type"] != "default" else None,
        "sliding_window_pattern": values["layer_types"].index("full_attention") + 1,
    }


def load(folder: Path):
    """The folder as transformers runs it: float32, eager attention."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager").eval()


def real_logits(model, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits of the tokens that `mask` shows, row after row.  BT, BT -> nV"""
    import torch

    ids, shown = torch.tensor(tokens), torch.tensor(mask).long()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=shown, position_ids=(shown.cumsum(-1) - 1).clamp(min=0)).logits
    return logits.numpy()[mask]


def pad(rows: list[np.ndarray], side: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one width, and which slots are real.  -> BT, BT"""
    width = max(len(row) for row in rows)
    before = [width - len(row) if side == "left" else 0 for row in rows]
    tokens = [np.pad(row, (start, width - len(row) - start)) for row, start in zip(rows, before, strict=True)]
    mask = [np.pad(np.ones(len(row), bool), (start, width - len(row) - start)) for row, start in zip(rows, before, strict=True)]
    return np.stack(tokens), np.stack(mask)


def spread(key: str, width: int) -> float:
    """Of random weights: attention neither flat nor sharp, every layer heard beside the embedding."""
    if "norm" in key or "embed" in key:
        return 0.3
    return (1 if "q_proj" in key or "k_proj" in key else 2) * width**-0.5


def make(name: str, folder: Path, seed: int) -> None:
    """Write one folder."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    family, fields = VARIANTS[name] if name in VARIANTS else ("Gemma4Text", GEMMA4[name])
    config = getattr(transformers, family + "Config")(**(BASE | fields))
    model = getattr(transformers, family.removesuffix("Text") + "ForCausalLM")(config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.copy_(spread(key, weight.shape[-1]) * torch.randn(weight.shape, generator=random))
        for key, weight in model.state_dict().items():
            if family == "Gemma4Text" and ("norm" in key or "scalar" in key):  # it multiplies by w, not by 1 + w
                typical = 0.5 if "layers" in key and "norm" in key else 1.0  # or rounding would grow from layer to layer
                weight.copy_(typical * (1 + 0.3 * torch.randn(weight.shape, generator=random)))
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    older = older_dialect(json.loads((folder / "config.json").read_text()))
    (folder / "config_v4.json").write_text(json.dumps(older, indent=2) + "\n")

    model = load(folder)
    numbers = np.random.default_rng(seed)
    rows = [np.append(2, numbers.integers(3, VOCABULARY, length - 1)) for length in LENGTHS]
    left, right = (real_logits(model, *pad(rows, side)) for side in ("left", "right"))
    alone = real_logits(model, *pad(rows[:1], "right"))
    gradients = gradients_of(model, rows[0]) if family == "Gemma4Text" else {}
    arrays: dict[str, Any] = {f"gradient/{key}": gradient for key, gradient in gradients.items()}
    np.savez_compressed(
        folder / "reference.npz", tokens=pad(rows, "right")[0].astype(np.int32), lengths=np.array(LENGTHS, np.int32),
        left=left, right=right, alone=alone, **arrays,
    )  # fmt: skip


def gradients_of(model, row: np.ndarray) -> dict[str, np.ndarray]:
    """The gradient of a row's mean cross-entropy by each weight."""
    import torch

    ids = torch.tensor(row)[None]
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(input_ids=ids, use_cache=False).logits[0, :-1], ids[0, 1:]).backward()
    return {key: weight.grad.numpy() for key, weight in model.named_parameters()}


if __name__ == "__main__":
    for seed, name in [*enumerate(VARIANTS), *enumerate(GEMMA4, 51)]:
        make(name, REFERENCES / name, seed)
