"""Write a model as a Hugging Face folder, for transformers, vLLM and lm-eval; or its LoRA adapters as a PEFT folder.

    python scripts/export.py --model_path RUN_DIR --out DIR
    python scripts/export.py --model_path LORA --base_path DIR --adapter_alpha 64 --out DIR [--lora peft]

Any model that can be trained can be exported. Weights go from disk to disk leaf by leaf; DIR is there whole or not at all. The
last line of standard output is one line of JSON.
"""

import hashlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.tokenizer import Tokenizer, load_tokenizer
from grpo.config import flag
from grpo.errors import ConfigError, RunError
from grpo.reports.model_card import model_card
from grpo.runs.cli import run_script
from grpo.runs.flags import parse
from grpo.runs.model_source import DESCRIPTION, Model, find_model, has_tokenizer
from grpo.runs.setup import check_tokenizer
from models.formats.adapters import write_peft
from models.formats.containers import read_json
from models.formats.save import config_json, tensor_bytes, tensors, text_config, write_json, write_weights

SUMS = "SHA256SUMS"
SPARE = 2**26  # bytes that the tokenizer's files may take

# As data/prompts.py places turns: what Gemma's own template makes of one question.
CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else \
message['role']) + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""


@dataclass(frozen=True)
class ExportConfig:
    model_path: str = flag("", "what to export: a run's directory or checkpoint, adapters, any model folder")
    out: str = flag("", "folder to write")
    dtype: str = flag("auto", "auto: bfloat16 of weights, float32 of adapters", choices=("auto", "bfloat16", "float32"))
    lora: str = flag("merged", "adapters: merged into their base, or a PEFT folder of their own", choices=("merged", "peft"))
    base_path: str = flag("", "the model that adapters lie on; a run's base model, if it has moved")
    adapter_alpha: float = flag(0.0, "alpha of adapters that do not say it")

    def __post_init__(self):
        for name in ("model_path", "out"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is needed; give --{name}")


def main(argv: list[str]) -> dict[str, Any]:
    config = parse(ExportConfig, argv, __doc__ or "")
    model = find_model(config.model_path, config.base_path, config.adapter_alpha)
    print(model.line, file=sys.stderr)
    if not has_tokenizer(model.folder):
        raise ConfigError(f"{model.folder} holds no tokenizer.json and no tokenizer.model; put the model's own there")
    tokenizer = load_tokenizer(model.folder)
    check_tokenizer(tokenizer, model.config)
    if config.lora == "peft" and not model.adapters:
        raise ConfigError(f"lora peft: {model.found} has no adapters; leave --lora out")
    out, dtype = Path(config.out).resolve(), config.dtype
    if dtype == "auto":
        dtype = "float32" if config.lora == "peft" else "bfloat16"
    with new_folder(out, model) as folder:
        write_tokenizer(folder, model, tokenizer)
        if config.lora == "peft":
            assert model.adapters and model.under
            write_peft(folder, model.adapters(), model.config, public_name(model.under), dtype)
        else:
            assert model.open
            weights = tensors(model.config, model.open())
            check_space(folder, sum(tensor_bytes(tensor, dtype) for tensor in weights))
            write_json(folder / "config.json", config_of(model, tokenizer, dtype))
            write_weights(folder, weights, dtype)
        base = (model.under.path.name or "the base model") if model.under and config.lora == "peft" else ""
        card = model_card(out.name, model.size, dtype, base, model.run_dir, model.meta)
        (folder / "README.md").write_text(card, "utf-8")
        sums = {file.name: sha256(file) for file in sorted(folder.iterdir()) if file.name != SUMS}
        (folder / SUMS).write_text("".join(f"{found}  {name}\n" for name, found in sums.items()))
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"written to {out} in {dtype}", file=sys.stderr)
    return {"out": config.out, "model": model.line, "dtype": dtype, "files": sorted(sums), "bytes": size}


# ------------------------------------------------------------------------------------------------------------------ the folder


@contextmanager
def new_folder(out: Path, model: Model) -> Iterator[Path]:
    """OUT.part, which becomes OUT when all is written. Only an earlier export is ever replaced."""
    part = out.parent / f"{out.name}.part"
    if out.exists() and out.resolve() in (model.path.resolve(), model.folder.resolve()):
        raise ConfigError(f"out {out} is the model itself; give another folder")
    for folder in (out, part):
        if folder.exists() and not is_export(folder):
            raise ConfigError(f"out: {folder} is there, and is no earlier export; remove it or give another --out")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        (part / SUMS).touch()  # the mark of an export, whole or not
    except OSError as error:
        raise ConfigError(f"out {out} cannot be written: {error.strerror}") from None
    try:
        yield part
        if out.exists():
            shutil.rmtree(out)
        part.rename(out)
    except OSError as error:
        raise RunError(f"out {out} could not be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def is_export(folder: Path) -> bool:
    """Whether every file in a folder is one that an earlier export wrote: nothing else may be removed."""
    if not folder.is_dir():
        return False
    there = {file.name for file in folder.iterdir()}
    if not there or (folder.suffix == ".part" and SUMS in there):
        return True
    listed = (folder / SUMS).read_text("utf-8").splitlines() if SUMS in there else []
    return {SUMS, *(line.partition("  ")[2] for line in listed)} == there


def public_name(model: Model) -> str:
    """As transformers asks for it: hf:google/gemma-2-2b@main -> google/gemma-2-2b."""
    path = str(model.path)
    return path.removeprefix("hf:").partition("@")[0] if path.startswith("hf:") else path


def check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size + SPARE:
        raise RunError(f"out {folder.parent} has {free / 1e6:.0f} MB free, {(size + SPARE) / 1e6:.0f} MB are needed")


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------- what lies beside weights


def config_of(model: Model, tokenizer: Tokenizer, dtype: str) -> dict:
    """The base's own config.json, but for the dtype; that of a text model, when the base has other parts too."""
    if (model.folder / "config.json").is_file():
        values = text_config(read_json(model.folder / "config.json"))
    else:
        values = config_json(
            model.config, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id
        )
    said = [key for key in ("dtype", "torch_dtype") if key in values] or ["torch_dtype"]
    return values | dict.fromkeys(said, dtype)


def write_tokenizer(folder: Path, model: Model, tokenizer: Tokenizer) -> None:
    """The tokenizer's files as they are, a chat template where there was none, and both ids that end a completion."""
    for name in set(DESCRIPTION) - {"config.json", "generation_config.json"}:
        if (model.folder / name).is_file():
            shutil.copyfile(model.folder / name, folder / name)
    settings = folder / "tokenizer_config.json"
    if not settings.is_file():
        pieces = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
        write_json(settings, {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False, **pieces})
    if "chat_template" not in read_json(settings) and not any(folder.glob("chat_template.*")):
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
    stated = model.folder / "generation_config.json"
    generation = read_json(stated) if stated.is_file() else {"do_sample": False}
    ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    said = generation.get("eos_token_id") or []
    ends = {*(said if isinstance(said, list) else [said]), *tokenizer.stop_ids}
    write_json(folder / "generation_config.json", {**ids, **generation, "eos_token_id": sorted(ends)})


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
