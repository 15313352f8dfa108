"""Text to Gemma's token ids and back, from a `tokenizer.json` or a `tokenizer.model`.

Ids are always looked up by piece: 107 is `<end_of_turn>` in Gemma 2 and a newline in Gemma 3. Text never becomes a
control piece: a question that contains "<end_of_turn>" is spelled out in ordinary pieces, so it cannot end its own
turn. Prompts place the control ids themselves (prompts.py). Left out: truncation, padding, BOS, chat templates.
"""

import hashlib
import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

from data import DataError

# Pieces that steer the model instead of standing for text, in Gemma 1, 2 and 3. Kept by name because the two file
# formats flag different ones: <unused7> is control in tokenizer.model and ordinary in tokenizer.json. Runs of blanks
# and HTML tags are whole pieces too, but they are text.
CONTROL = re.compile(
    r"<(pad|eos|bos|unk|mask|2mass|unused\d+|(start|end)_of_(turn|image)|image_soft_token)>|\[multimodal\]|\[@BOS@\]"
)
NEEDED = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")


class Tokenizer:
    """Encoder and decoder of one folder; `load_tokenizer` makes it.

    `stop_ids` are the ids that end a completion: EOS and end-of-turn. `vocab_size` is one more than the largest id,
    not counting Gemma 3's <image_soft_token>: it lies past the rows of a text-only model, and `encode` never gives it.
    """

    def __init__(
        self,
        folder: Path,
        ids: dict[str, int],
        flagged: set[str],
        encode_text: Callable[[str], list[int]],
        decode_ids: Callable[[list[int]], str],
    ):
        """`ids` gives the id of every piece; `flagged` names the pieces that the file itself calls control pieces."""
        self.folder = folder
        self._ids = ids
        self._encode_text = encode_text
        self._decode_ids = decode_ids
        for piece in NEEDED:
            if piece not in ids:
                raise DataError(f'tokenizer in {folder} has no piece "{piece}": not a Gemma tokenizer')
        self.pad_id, self.eos_id, self.bos_id, self.start_of_turn_id, self.end_of_turn_id = (ids[p] for p in NEEDED)
        self.stop_ids = (self.eos_id, self.end_of_turn_id)
        unnamed = sorted(piece for piece in flagged if not CONTROL.fullmatch(piece))
        # A look-ahead finds every place where a control piece starts, also one that begins inside another.
        self._control_start = re.compile(f"(?={'|'.join([CONTROL.pattern, *map(re.escape, unnamed)])})")
        self._control_ids = {i for piece, i in ids.items() if piece in flagged or CONTROL.fullmatch(piece)}
        self._pieces = {i: piece for piece, i in ids.items()}
        self.vocab_size = 1 + max(i for piece, i in ids.items() if piece != "<image_soft_token>")
        self._check_text_comes_back()

    def encode(self, text: str) -> list[int]:
        """Ids of `text` without BOS or EOS; a control piece in the text becomes ordinary pieces that spell it."""
        # Cut each control piece after its first character: neither half is a control piece, and ids are joined, not
        # text, so it cannot form again.
        cuts = [0, *(match.start() + 1 for match in self._control_start.finditer(text)), len(text)]
        return [i for start, end in pairwise(cuts) for i in self._encode_text(text[start:end])]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` (ints or a numpy row); control pieces (pad, BOS, EOS, turns, unused ones) give no text."""
        return self._decode_ids([int(i) for i in ids if int(i) not in self._control_ids])

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Text of each of `ids`. Joined they read as the text, but for control pieces and bytes ("<0x0A>"), which are named."""
        return [self._pieces[int(i)].replace("▁", " ") for i in ids]

    @property
    def fingerprint(self) -> str:
        """16 hex digits of all pieces and their ids, and of how a sentence is cut: the same from either file format."""
        content = sorted(self._ids.items()), self.encode("Ann's 3 cats ate 12.50 kg,\n  one-third of it on Monday.")
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def piece_id(self, piece: str) -> int:
        """Id of a piece as the vocabulary spells it (a blank is "▁"); DataError when there is none."""
        if piece not in self._ids:
            raise DataError(f'tokenizer in {self.folder} has no piece "{piece}"')
        return self._ids[piece]

    def _check_text_comes_back(self) -> None:
        # Prompts are encoded in parts. Some other families put a blank before each part or squeeze blanks.
        first, second = "user\n", "  model"
        back = self.decode(self.encode(first) + self.encode(second))
        if back != first + second:
            raise DataError(
                f"tokenizer in {self.folder} changes text: {first + second!r} comes back as {back!r}: not a Gemma tokenizer"
            )


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of `folder`: its `tokenizer.json` if it has one, else its `tokenizer.model`.

    Raises DataError when there is neither, or when the file is damaged or not Gemma's.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        return _load_json(folder)
    if (folder / "tokenizer.model").is_file():
        return _load_sentencepiece(folder)
    raise DataError(f"no tokenizer.json and no tokenizer.model in {folder}")


def _load_json(folder: Path) -> Tokenizer:
    # `tokenizers` alone: importing transformers for the same result takes seconds.
    import tokenizers

    path = folder / "tokenizer.json"
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise DataError(f"cannot read {path}: {error}") from error
    backend.no_truncation()  # both may be stored in the file, left from someone's training
    backend.no_padding()
    return Tokenizer(
        folder,
        ids=backend.get_vocab(with_added_tokens=True),
        flagged={token.content for token in backend.get_added_tokens_decoder().values() if token.special},
        encode_text=lambda text: backend.encode(text, add_special_tokens=False).ids,
        decode_ids=lambda ids: backend.decode(ids, skip_special_tokens=False),
    )


def _load_sentencepiece(folder: Path) -> Tokenizer:
    import sentencepiece

    path = folder / "tokenizer.model"
    try:
        backend = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    pieces = backend.id_to_piece(list(range(backend.vocab_size())))
    return Tokenizer(
        folder,
        ids={piece: i for i, piece in enumerate(pieces)},
        flagged={piece for i, piece in enumerate(pieces) if backend.is_control(i) or backend.is_unknown(i)},
        encode_text=backend.encode,
        decode_ids=backend.decode,
    )
