"""Public reports on checkpoints and adapters, by the issue that reported them: computed as others do, or refused.

`SAME` means the logits of transformers or peft on the same folder (float32, eager), whatever they are; those tests are long,
because they need torch. Other values are part of the one line that refuses.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_references import REFERENCES, load, pad, real_logits
from safetensors.numpy import load_file, save_file
from test_gemma import close, our_logits

from grpo.runs.model_source import find_model
from models import ModelError
from models.formats.convert import read_config
from models.formats.save import text_config
from models.sharding import STORE

UNCHANGED = "computes what the folder computed before"
G1, G2, G3, G4 = "gemma1-mqa", "gemma2-gqa", "gemma3-gqa", "gemma4-e2b"
SAME = "computes what transformers computes"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
ROWS = [np.arange(2, 42), np.arange(9, 20)]
pytestmark = pytest.mark.usefixtures("mesh")


def config(**changes: Any) -> Callable[[Path], None]:
    """Set keys of config.json; None takes a key away."""

    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({key: x for key, x in values.items() if x is not None}))

    return change


def weights(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / WHOLE)
        tensors = change(tensors) or tensors
        (folder / WHOLE).unlink()
        save_file(tensors, folder / WHOLE, {"format": "pt"})

    return changed


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return weights(lambda t: {re.sub(old, new, name): x for name, x in t.items()})


def stale_index(old_shard: bool) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WHOLE)
        if old_shard:
            save_file({name: x + 1 for name, x in tensors.items()}, folder / "old.safetensors", {"format": "pt"})
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, "old.safetensors")}))

    return change


def multimodal(prefix: str, kind: str = "gemma3", **outer: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = json.loads((folder / "config.json").read_text())
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        values = {"model_type": kind, **({"vision_config": vision} if kind == "gemma3" else {})}
        (folder / "config.json").write_text(json.dumps(values | {"text_config": text} | outer))
        renamed(r"^model\.", prefix)(folder)

    return change


LINEAR, DEFAULT = {"rope_type": "linear", "factor": 8.0}, {"rope_type": "default", "rope_theta": 1e4}
FOLDERS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "peft#2777, transformers#45127: a head that differs": (
        G3, weights(lambda t: t.update({"lm_head.weight": t[EMBEDDING] * 2})),
        "lm_head.weight differs from embed_tokens.weight; a separate vocabulary head is not supported",
    ),
    "peft#2018, unsloth#9331: the same, Gemma 2, one element": (
        G2, weights(lambda t: t.update({"lm_head.weight": t[EMBEDDING] + np.eye(64, 40, 3, "f4")})),
        "lm_head.weight differs from embed_tokens.weight",
    ),
    "vllm#3404: a head that is the embedding": (
        G3, weights(lambda t: t.update({"lm_head.weight": t[EMBEDDING].copy()})), SAME,
    ),
    "tie_word_embeddings: false": (
        G2, config(tie_word_embeddings=False), "tie_word_embeddings is false; a separate vocabulary head",
    ),
    "mlx-vlm#1329, diffusers#14719: an older index and its shard": (G3, stale_index(True), SAME),
    "an index whose shards were removed": (G3, stale_index(False), SAME),
    "Gemma 2: rope_scaling of version 4 beside rope_parameters": (
        G2, config(rope_scaling=LINEAR, rope_parameters=DEFAULT),
        "rope_type linear of sliding_attention is not supported; default is needed",
    ),
    "Gemma 1: the same": (G1, config(rope_scaling=LINEAR, rope_parameters=DEFAULT), SAME),
    "Gemma 3: the same": (G3, config(rope_scaling=LINEAR), SAME),
    "Gemma 3: a factor of the default type": (
        G3, config(rope_parameters={"full_attention": {**DEFAULT, "factor": 8.0}, "sliding_attention": DEFAULT}), SAME,
    ),
    "Gemma 3: rope_parameters of one level": (G3, config(rope_parameters={**LINEAR, "rope_theta": 1e4}), SAME),
    "Gemma 3: rope_scaling with the older key": (
        G3, config(rope_scaling={"type": "linear", "factor": 8.0}), 'passes over "type": "linear" of RoPE',
    ),
    "Gemma 3: yarn": (G3, config(rope_scaling={"rope_type": "yarn", "factor": 8.0}), "rope_type yarn of full_attention"),
    "Gemma 3: no rope at all": (G3, config(rope_parameters=None), SAME),
    "Gemma 3: a pattern instead of layer_types": (
        G3, config(layer_types=None, _sliding_window_pattern=None, sliding_window_pattern=2), SAME,
    ),
    "Gemma 3: a pattern with an underscore alone": (G3, config(layer_types=None, _sliding_window_pattern=2), SAME),
    "no architectures": (G2, config(architectures=None), SAME),
    "PeftModelForCausalLM first": (G2, config(architectures=["PeftModelForCausalLM", "Gemma2ForCausalLM"]), SAME),
    "Gemma 2 without query_pre_attn_scalar": (G2, config(query_pre_attn_scalar=None), SAME),
    "Gemma 2 without caps": (G2, config(attn_logit_softcapping=None, final_logit_softcapping=None), SAME),
    "gelu_new": (G2, config(hidden_activation="gelu_new"), SAME),
    "Gemma 2 and 3: gelu is not the tanh form": (
        G2, config(hidden_activation="gelu"), "activation gelu is unknown; gelu_pytorch_tanh is needed",
    ),
    "Gemma 1: gelu is the tanh form": (G1, config(hidden_act="gelu"), SAME),
    "float64": (
        G3, weights(lambda t: {name: x.astype(np.float64) for name, x in t.items()}), "is F64; F32, F16 or BF16 is",
    ),
    "float16 in part": (
        G3, weights(lambda t: {name: x.astype("f2") if "mlp" in name else x for name, x in t.items()}), SAME,
    ),
    "peft's base_model.model.": (
        G3, renamed("^", "base_model.model."),
        "but base_model.model.model.embed_tokens.weight is there: save the model without its wrapper",
    ),
    "torch's _orig_mod.": (G3, renamed("^", "_orig_mod."), "but _orig_mod.model.embed_tokens.weight is there"),
    "DDP's module.": (G3, renamed("^", "module."), "but module.model.embed_tokens.weight is there"),
    "FSDP's wrapper in every layer": (
        G3, renamed(r"(layers\.\d+)", r"\1._fsdp_wrapped_module"), "but layers.0._fsdp_wrapped_module.input_layernorm.weight",
    ),
    "vllm#48019: language_model.model.": (G3, multimodal("language_model.model."), UNCHANGED),
    "the text part: model.language_model.": (G3, multimodal("model.language_model."), UNCHANGED),
    "the text part of Gemma 4": (G4, multimodal("model.language_model.", "gemma4"), UNCHANGED),
    "a multimodal model with a head of its own": (
        G3, multimodal("language_model.model.", tie_word_embeddings=False), "tie_word_embeddings is false",
    ),
    "unsloth#1601: a quantization_config that was left": (
        G3, config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), UNCHANGED,
    ),
    "fp8": (G3, weights(lambda t: t.update({EMBEDDING: t[EMBEDDING].astype(np.int8)})), "is I8; F32, F16 or"),
    "bidirectional attention": (G3, config(use_bidirectional_attention=True), "both must be false"),
}  # fmt: skip


def changed(tmp_path: Path, name: str) -> tuple[Path, str]:
    source, change, said = FOLDERS[name]
    for file in ("config.json", WHOLE):
        shutil.copy(REFERENCES / source / file, tmp_path)
    change(tmp_path)
    return tmp_path, said


def logits_of_folder(mesh, path: Path, base: Path | str = "") -> np.ndarray:
    model = find_model(path, base)
    return our_logits(model.load(mesh, STORE, "float32"), model.config, ROWS, "right")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_loads_or_is_refused_in_one_line(name, tmp_path, mesh):
    folder, said = changed(tmp_path, name)
    if said in (SAME, UNCHANGED):
        ours, plain = (logits_of_folder(mesh, place) for place in (folder, REFERENCES / FOLDERS[name][0]))
        assert np.isfinite(ours).all() and (said == SAME or (ours == plain).all())
    else:
        with pytest.raises(ModelError) as error:
            find_model(folder).load(mesh, STORE, "float32")
        assert said in str(error.value) and "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name, case in FOLDERS.items() if case[2] == SAME])
def test_a_folder_computes_what_transformers_computes(name, tmp_path, mesh):
    pytest.importorskip("torch")
    folder, _ = changed(tmp_path, name)
    close(logits_of_folder(mesh, folder), real_logits(load(folder), *pad(ROWS, "right")), 1e-4)


@pytest.mark.parametrize(("source", "kind"), [(G3, "gemma3"), (G4, "gemma4")])
def test_what_is_exported_of_a_multimodal_model_is_a_text_model(source, kind, tmp_path):
    shutil.copy(REFERENCES / source / "config.json", tmp_path)
    text = {"text_config": json.loads((tmp_path / "config.json").read_text()), "model_type": kind, "eos_token_id": [1, 106]}
    (tmp_path / "config.json").write_text(json.dumps(text))
    written = text_config(tmp_path / "config.json")
    assert written["model_type"] == f"{kind}_text" and written["architectures"] == [f"G{kind[1:]}ForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert read_config(tmp_path) == read_config(REFERENCES / source)


ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, SAME),
    "transformers#34468, peft#1626: PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights pissa is not supported"),
    "peft#1929: PiSSA by iteration": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4 is not"),
    "peft#2270: OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights olora is not supported"),
    "gaussian": ({"init_lora_weights": "gaussian"}, SAME),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, SAME),
    "DoRA": ({"use_dora": True}, "use_dora True is not supported"),
    "rank-stabilised": ({"use_rslora": True}, SAME),
    "an alpha with a fraction": ({"lora_alpha": 2.5}, SAME),
    "a rank above the width": ({"r": 80}, SAME),
    "peft#427: layers_to_transform": ({"layers_to_transform": [1]}, SAME),
    "peft#2155: a regex that leaves layers out": ({"target_modules": r".*\.[12]\.mlp\.up_proj"}, SAME),
    "a regex over all layers": ({"target_modules": r".*\.(q_proj|down_proj)"}, SAME),
    "all-linear": ({"target_modules": "all-linear"}, SAME),
    "rank_pattern and alpha_pattern": ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1.*up_proj": 9}}, SAME),
    "exclude_modules": ({"exclude_modules": ["up_proj"]}, SAME),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, SAME),
    "vllm#2816: the embedding saved beside them": ({"modules_to_save": ["embed_tokens"]}, SAME),
    "a head of their own": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    "the embedding as a target": ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
    "biases": ({"bias": "lora_only"}, "bias lora_only is not supported"),
    "tokens": ({"trainable_token_indices": [5]}, "trainable_token_indices [5] is not supported"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.filterwarnings("ignore")  # peft's
def test_adapters_that_peft_wrote_compute_what_peft_computes(name, tmp_path, mesh):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    changes, said = ADAPTERS[name]
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]} | changes
    theirs = peft.get_peft_model(load(REFERENCES / G2), peft.LoraConfig(**settings)).eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, weight in theirs.named_parameters():
            if "lora_B" in key:
                weight.add_(0.1 * torch.randn(weight.shape, generator=random))
    theirs.save_pretrained(tmp_path / "adapters")
    where = (tmp_path / "adapters", REFERENCES / G2)
    if said == SAME:
        expected = real_logits(theirs, *pad(ROWS, "right"))
        close(logits_of_folder(mesh, *where), expected, 1e-4)
        assert np.abs(expected - logits_of_folder(mesh, where[1])).max() > 1e-2
    else:
        with pytest.raises(ModelError) as error:
            find_model(*where).load(mesh, STORE, "float32")
        assert said in str(error.value) and "\n" not in str(error.value)
