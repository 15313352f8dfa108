"""Gemma's tokenizer and chat template: text to token ids and back, and a question as a whole prompt.

transformers reads them, so that a folder's files mean what they mean there. Read without it: the embedded model, for its start,
and a `tokenizer.model` without `tokenizer.json` (Kaggle, GGUF), by sentencepiece. A folder without a template gets the one of
Gemma 1, 2 and 3.

Special ids are looked up by piece, because they differ: 107 is `<end_of_turn>` in Gemma 2 and a newline in Gemma 3. Text never
encodes to a control piece: "<end_of_turn>" in a question is encoded as ordinary pieces, so it cannot end the turn. Nothing is
truncated or padded here.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from data import DataError

# Pieces that steer the model instead of standing for text, in Gemma 1, 2 and 3. They are listed by name because the two
# file formats flag different ones: <unused7> is a control piece in tokenizer.model but not in tokenizer.json. Runs of
# blanks and HTML tags are whole pieces too, but they are text.
CONTROL = re.compile(
    r"<(?:pad|eos|bos|unk|mask|2mass|unused\d+|(?:start|end)_of_(?:turn|image)|image_soft_token)>|\[multimodal\]|\[@BOS@\]"
)
NEEDED = ("<pad>", "<eos>", "<bos>")
EMBEDDED = Path(__file__).parents[1] / "models" / "tiny"
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
# What stands for them in a rendered template.
QUESTION, ANSWER, INSTRUCTIONS = "\ue000question\ue001", "\ue000answer\ue001", "\ue000instructions\ue001"
THOUGHTS = "<|channel>", "<channel|>"  # what a Gemma 4 thinks stands between them


def gemma_template(answer: str | None = None, system: str = "") -> str:
    """The turns of a question in the template of Gemma 1 to 3, which has no system role: up to the answer, or with it."""
    turns = f"<bos><start_of_turn>user\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n"
    return turns if answer is None else f"{turns}{answer}<end_of_turn>\n"


class Tokenizer:
    """The tokenizer of a model folder; made by `load_tokenizer`.

    `stop_ids` are the ids that end a completion, in training, evaluation, sampling and export alike: EOS, what ends a turn in
    the template, and those that the folder states (`stated_stop_ids`, `eos_token`). `vocab_size` is one more than the largest
    id, apart from that of Gemma 3's <image_soft_token>, which text-only models have no row for; `encode` never returns it.
    """

    def __init__(
        self,
        folder: Path,
        ids: dict[str, int],
        flagged: set[str],
        encode_text: Callable[[str], list[int]],
        decode_ids: Callable[[list[int]], str],
        render: Callable[[str | None, str], str] = gemma_template,
        eos_id: int | None = None,
    ):
        """`ids` maps every piece to its id; `flagged` are the pieces that the file marks as control pieces.

        `render` gives the turns of QUESTION in the folder's template, up to the answer or with it, and after a system prompt or
        without one; `eos_id` is what transformers takes for EOS, which may be another id.
        """
        self.folder = folder
        self._ids = ids
        self._encode_text = encode_text
        self._decode_ids = decode_ids
        self.pad_id, self.eos_id, self.bos_id = map(self.piece_id, NEEDED)
        unnamed = sorted(piece for piece in flagged if not CONTROL.fullmatch(piece))
        control = "|".join([CONTROL.pattern, *map(re.escape, unnamed)])
        # A look-ahead finds every place where a control piece starts, even inside another one.
        self._control_start = re.compile(f"(?={control})")
        self._control_ids = {i for piece, i in ids.items() if piece in flagged or CONTROL.fullmatch(piece)}
        self._pieces = {i: piece for piece, i in ids.items()}
        self.vocab_size = 1 + max(i for piece, i in ids.items() if piece != "<image_soft_token>")
        self._template, with_system = render(None, ""), render(None, INSTRUCTIONS)
        # A system role puts the end of a turn between the system prompt and the question.
        between = with_system.partition(INSTRUCTIONS)[2].partition(QUESTION)[0]
        self.has_system_role = bool(re.search(control, between))
        # text, a control piece, text, and so on
        self._prompts = [re.split(f"({control})", template) for template in (self._template, with_system)]
        opened, closed = (self._template.count(mark) for mark in THOUGHTS)
        self._thought_ids = [ids[mark] for mark in THOUGHTS if mark in ids]
        self._starts_in_thought = opened > closed
        end = re.match(control, render(ANSWER, "").partition(ANSWER)[2].lstrip())
        self.end_of_turn_id = self.piece_id(end[0]) if end else self.eos_id
        ends = [self.eos_id, self.end_of_turn_id, *([] if eos_id is None else [eos_id]), *stated_stop_ids(folder)]
        self.stop_ids = tuple(dict.fromkeys(ends))
        self._check_text_comes_back()
        self.encode_turn("")  # which looks up the template's control pieces

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without BOS and EOS. Control pieces in the text are encoded as ordinary pieces."""
        # Cut each control piece after its first character: neither part is a control piece, and joining ids instead of
        # text cannot form one again.
        cuts = [0, *(match.start() + 1 for match in self._control_start.finditer(text)), len(text)]
        return [i for start, end in pairwise(cuts) for i in self._encode_text(text[start:end])]

    def encode_turn(self, text: str, system: str = "") -> list[int]:
        """The ids of the chat template with `text` as the user's turn; the control pieces are the template's alone.

        `system` becomes the system's turn, which only a template with a system role has.
        """
        ids = []
        for i, part in enumerate(self._prompts[bool(system)]):
            if i % 2:
                ids.append(self.piece_id(part))
            else:
                pieces = re.split(f"({QUESTION}|{INSTRUCTIONS})", part)
                ids += self.encode("".join({QUESTION: text, INSTRUCTIONS: system}.get(piece, piece) for piece in pieces))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a completion's `ids` (ints or a numpy row), which rewards read.

        Control pieces (pad, BOS, EOS, turns, unused ones) are left out, and so is what a Gemma 4 thinks: all between
        `<|channel>` and `<channel|>`, or up to the end if the channel is not closed.
        """
        return self._decode_ids([i for i in self._outside_thoughts(map(int, ids)) if i not in self._control_ids])

    def _outside_thoughts(self, ids: Iterable[int]) -> Iterator[int]:
        inside = self._starts_in_thought
        for i in ids:
            if i in self._thought_ids:
                inside = i == self._thought_ids[0]
            elif not inside:
                yield i

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The text of each id. Joined they are the text, except that control pieces and bytes ("<0x0A>") appear by name."""
        return [self._pieces.get(int(i), f"<{int(i)}>").replace("▁", " ") for i in ids]  # a model may have rows without a piece

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify all pieces, their ids, and how a sentence is split; equal for both file formats."""
        content = sorted(self._ids.items()), self.encode("Ann's 3 cats ate 12.50 kg,\n  one-third of it on Monday.")
        if self._template != gemma_template():
            content += (self._template,)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def piece_id(self, piece: str) -> int:
        """The id of a piece, spelled as in the vocabulary (a blank is "▁"). Raises DataError for an unknown piece."""
        if piece not in self._ids:
            raise DataError(f'tokenizer in {self.folder} has no piece "{piece}": not a Gemma tokenizer')
        return self._ids[piece]

    def _check_text_comes_back(self) -> None:
        # Prompts are encoded in parts; other families' tokenizers may prepend a blank to each part or merge blanks.
        first, second = "user\n", "  model"
        back = self.decode(self.encode(first) + self.encode(second))
        if back != first + second:
            raise DataError(
                f"tokenizer in {self.folder} changes text: {first + second!r} comes back as {back!r}: not a Gemma tokenizer"
            )


def stated_stop_ids(folder: Path) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json, or without that file of config.json: one id or several. Raises DataError."""
    path = next((folder / name for name in ("generation_config.json", "config.json") if (folder / name).is_file()), None)
    if path is None:
        return ()
    try:
        values = json.loads(path.read_bytes())
        found = values.get("eos_token_id") or values.get("text_config", {}).get("eos_token_id") or []
        ids = found if isinstance(found, list) else [found]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(f"eos_token_id {str(found)[:40]} must be an id or a list of ids")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {' '.join(str(error).split())[:100]}") from None
    return tuple(ids)


def load_tokenizer(folder: str | Path, thinking: bool = False) -> Tokenizer:
    """Load the tokenizer of a folder, from its `tokenizer.json` or `tokenizer.model`.

    `thinking` is the `enable_thinking` of its template. Raises DataError when there is neither, for a file that is damaged or
    not Gemma's, and for a template that cannot switch thinking on.
    """
    folder = Path(folder)
    if not has_tokenizer(folder):
        raise DataError(f"no tokenizer.json and no tokenizer.model in {folder}")
    loaded, stated = None, {}
    if any((folder / name).is_file() for name in FILES) and not is_embedded(folder):
        loaded = _load_transformers(folder)
        stated = {"eos_id": loaded.eos_token_id}
        if loaded.chat_template:
            stated["render"] = partial(_render, loaded, folder, thinking)
    if thinking and ("render" not in stated or stated["render"](None, "") == _render(loaded, folder, False, None, "")):
        raise DataError(f"thinking true: the chat template of {folder} cannot switch it on; leave it out")
    if not (folder / "tokenizer.json").is_file():
        return Tokenizer(folder, *_read_sentencepiece(folder), **stated)
    import tokenizers

    backend = loaded.backend_tokenizer if loaded else tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Tokenizer(
        folder,
        backend.get_vocab(with_added_tokens=True),
        {token.content for token in backend.get_added_tokens_decoder().values() if token.special},
        lambda text: backend.encode(text, add_special_tokens=False).ids,
        lambda ids: backend.decode(ids, skip_special_tokens=False),
        **stated,
    )


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def is_embedded(folder: Path) -> bool:
    """Whether a folder has the embedded model's tokenizer, as its own folder and its runs have."""

    def content(path: Path) -> bytes | None:
        return path.read_bytes() if path.is_file() else None

    return all(content(folder / name) == content(EMBEDDED / name) for name in FILES)


def _load_transformers(folder: Path) -> Any:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would advise to install torch
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            mask_token=None,  # it would add a <mask>
        )
        backend = loaded.backend_tokenizer
    except Exception as error:  # tokenizers has no exception types of its own, and transformers many
        path = next(path for name in ("tokenizer.json", "tokenizer.model") if (path := folder / name).is_file())
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from error
    backend.no_truncation()  # the file may contain both, from someone's training
    backend.no_padding()
    own = backend.get_vocab(with_added_tokens=False)
    for piece in NEEDED:
        if piece not in own:  # transformers would add it, with an id that the model has no row for
            raise DataError(f'tokenizer in {folder} has no piece "{piece}": not a Gemma tokenizer')
    return loaded


def _render(loaded: Any, folder: Path, thinking: bool, answer: str | None, system: str) -> str:
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": QUESTION}]
    turns += [] if answer is None else [{"role": "assistant", "content": answer}]
    try:
        text = loaded.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None, enable_thinking=thinking)
    except Exception as error:  # a template may raise what it likes
        if system:  # as those of Gemma 1 and 2, which have no system role
            return ""
        raise DataError(f"chat template of {folder} fails: {' '.join(str(error).split())[:200]}") from error
    if any(text.count(wanted) != 1 for wanted in (QUESTION, answer or QUESTION)):
        raise DataError(f"chat template of {folder} does not show a question and its answer once, as they are")
    return text


def _read_sentencepiece(folder: Path) -> tuple[dict[str, int], set[str], Callable, Callable]:
    # transformers converts the file to another algorithm, which splits long runs of blanks into other pieces.
    import sentencepiece

    path = folder / "tokenizer.model"
    try:
        backend = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    pieces = backend.id_to_piece(list(range(backend.vocab_size())))
    flagged = {piece for i, piece in enumerate(pieces) if backend.is_control(i) or backend.is_unknown(i)}
    return {piece: i for i, piece in enumerate(pieces)}, flagged, backend.encode, backend.decode
