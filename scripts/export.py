"""Export a model as a Hugging Face folder for transformers, vLLM and lm-eval, or its LoRA adapters as a PEFT folder.

    python scripts/export.py --model_path RUN_DIR --out DIR
    python scripts/export.py --model_path LORA --base_path DIR --adapter_alpha 64 --out DIR [--lora peft]

Any model that can be trained can be exported. Weights are copied one at a time. DIR appears only when everything is written.
The last line of standard output is JSON.
"""

import ctypes
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from grpo.config import flag
from grpo.errors import ConfigError, RunError
from grpo.reports.jsonl import parse_json
from grpo.reports.model_card import model_card
from grpo.runs.cli import run_script
from grpo.runs.flags import parse
from grpo.runs.model_source import DESCRIPTION, Model, find_model
from grpo.runs.run_dir import LOCK, take_lock
from grpo.runs.setup import check_tokenizer
from models.formats.adapters import write_peft
from models.formats.containers import read_json
from models.formats.save import config_json, tensor_bytes, tensors, text_config, write_json, write_weights

SUMS = "SHA256SUMS"
TOKENIZER_BYTES = 2**26  # an upper bound of the tokenizer's files

# The turns of data/prompts.py: what Gemma's own template renders for one question.
CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else \
message['role']) + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""


@dataclass(frozen=True)
class ExportConfig:
    model_path: str = flag("", "what to export: a run's directory or checkpoint, adapters, or any model folder")
    out: str = flag("", "folder to write")
    dtype: str = flag("auto", "auto: bfloat16 for weights, float32 for adapters", choices=("auto", "bfloat16", "float32"))
    lora: str = flag("merged", "adapters: merged into their base model, or as a PEFT folder", choices=("merged", "peft"))
    base_path: str = flag("", "the base model of adapters; the base model of a run, if it has moved")
    adapter_alpha: float = flag(0.0, "alpha of adapters that do not store it")

    def __post_init__(self):
        for name in ("model_path", "out"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is required; give --{name}")


def main(argv: list[str]) -> dict[str, Any]:
    config = parse(ExportConfig, argv, __doc__ or "")
    model = find_model(config.model_path, config.base_path, config.adapter_alpha)
    print(model.line, file=sys.stderr)
    if model.run_dir and (steps := planned_steps(model.run_dir)) > model.meta["step"]:
        print(f"note: this is step {model.meta['step']} of a run of {steps} steps", file=sys.stderr)
    if not has_tokenizer(model.folder):
        raise ConfigError(f"{model.folder} holds no tokenizer.json and no tokenizer.model; copy the model's own there")
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
        sums = {file.name: sha256(file) for file in sorted(folder.iterdir()) if file.name not in (SUMS, LOCK)}
        (folder / SUMS).write_text("".join(f"{found}  {name}\n" for name, found in sums.items()))
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"written to {out} in {dtype}", file=sys.stderr)
    return {"out": config.out, "model": model.line, "dtype": dtype, "files": sorted(sums), "bytes": size}


def planned_steps(run_dir: Path) -> int:
    """The last step of a run's last session; 0 if the run does not say."""
    path = run_dir / "sessions.json"
    try:
        return max(int(session["last_step"]) for session in parse_json(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        return 0


# ------------------------------------------------------------------------------------------------------------------ the folder


@contextmanager
def new_folder(out: Path, model: Model) -> Iterator[Path]:
    """OUT.part, locked for this process, which takes the place of OUT when the block ends without an error.

    At any time OUT is an earlier export or the new one, whole; only where the system cannot exchange two folders, the earlier
    one is at OUT.replaced for a moment. Only an earlier export is ever replaced.
    """
    part, old = out.with_name(f"{out.name}.part"), out.with_name(f"{out.name}.replaced")
    if out.exists() and out.resolve() in (model.path.resolve(), model.folder.resolve()):
        raise ConfigError(f"out {out} is the model itself; give another folder")
    try:
        for folder in (out, part):
            if (folder.exists() or folder.is_symlink()) and not is_export(folder):
                raise ConfigError(f"out: {folder} exists and is not an earlier export; remove it or give another --out")
        part.mkdir(parents=True, exist_ok=True)
        lock = take_lock(part)
        if is_export(old) and not out.exists():  # a process was killed between two renames
            old.rename(out)
        remove(old)
        empty(part)
        (part / SUMS).touch()  # marks the folder as an export, complete or not
    except OSError as error:
        raise ConfigError(f"out {out} cannot be written: {error.strerror}") from None
    try:
        yield part
        if not out.exists():
            part.rename(out)
        elif not exchange(part, out):
            out.rename(old)
            part.rename(out)
    except OSError as error:
        raise RunError(f"out {out} could not be written: {error.strerror or error}") from None
    finally:
        remove(part)
        remove(old)
        (out / LOCK).unlink(missing_ok=True)
        os.close(lock)


def empty(folder: Path) -> None:
    """Remove what is in a folder but its lock. The sums go last: if this process is killed, it is an export until then."""
    for file in sorted(folder.iterdir(), key=lambda file: file.name == SUMS):
        if file.name != LOCK:
            file.unlink()


def remove(folder: Path) -> None:
    """Remove an export, if the folder is one."""
    if is_export(folder):
        empty(folder)
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()


def exchange(one: Path, other: Path) -> bool:
    """Give each of two folders the other's name at once. False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    AT_FDCWD, RENAME_EXCHANGE = -100, 2
    return renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def is_export(folder: Path) -> bool:
    """Whether every file in a folder was written by an earlier export, so that the folder may be removed."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    present = {file.name for file in folder.iterdir()} - {LOCK}
    if any(file.is_dir() for file in folder.iterdir()):
        return False
    if not present or (folder.suffix in (".part", ".replaced") and SUMS in present):
        return True
    listed = (folder / SUMS).read_text("utf-8").splitlines() if SUMS in present else []
    return {SUMS, *(line.partition("  ")[2] for line in listed)} == present


def public_name(model: Model) -> str:
    """The name of a model as transformers expects it: hf:google/gemma-2-2b@main -> google/gemma-2-2b."""
    path = str(model.path)
    return path.removeprefix("hf:").partition("@")[0] if path.startswith("hf:") else path


def check_space(folder: Path, size: int) -> None:
    """Raises RunError unless there is room for weights of `size` bytes and a tokenizer."""
    free, needed = shutil.disk_usage(folder).free, size + TOKENIZER_BYTES
    if free < needed:
        raise RunError(f"out {folder.parent} has {free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB are needed")


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content, as hex digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------------ the other files


def config_of(model: Model, tokenizer: Tokenizer, dtype: str) -> dict:
    """The base model's config.json with the new dtype; of a multimodal model, that of its text part."""
    if (model.folder / "config.json").is_file():
        values = text_config(model.folder / "config.json")
    else:
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        values = config_json(model.config, ids)
    keys = [key for key in ("dtype", "torch_dtype") if key in values] or ["torch_dtype"]
    values.pop("quantization_config", None)  # left by a merge of QLoRA: what is written is not quantised
    return values | dict.fromkeys(keys, dtype)


def write_tokenizer(folder: Path, model: Model, tokenizer: Tokenizer) -> None:
    """Copy the tokenizer's files, and add a chat template and the ids that end a completion where they are missing."""
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
    write_json(folder / "generation_config.json", {**ids, **generation, "eos_token_id": sorted(tokenizer.stop_ids)})


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
