"""Text to tokens and back with the bundle's own ``tokenizer.json``; nothing here tokenizes by itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from runtimes.errors import BundleError, InputError
from runtimes.files.records import read_json_object
from runtimes.text.encoded_text import EncodedText
from runtimes.text.marks import marked_tokens, without_marks
from runtimes.text.stop_tokens import listed, stop_token_ids, without_added_end
from runtimes.text.tried import try_tokenizer

if TYPE_CHECKING:
    from runtimes.artifacts.manifest import ModelRecord

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
GENERATION_FILE = "generation_config.json"

REPLACEMENT = "\ufffd"
"""What a decoder shows for bytes that are not (yet) a character."""

CONTEXT_TOKENS = (8, 64)
"""Prompt tokens a detokenizer looks back at, as decoders strip the space before their first token; more where 8 end in a broken
character, since byte tokens decode as one run."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """``stop_token_ids`` end an answer: those that the manifest records, by the rule of runtimes/text/stop_tokens.py."""

    backend: tokenizers.Tokenizer
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    stop_token_ids: frozenset[int]
    special_token_ids: frozenset[int]

    @classmethod
    def load(cls, folder: Path | str, model: ModelRecord | None = None) -> Tokenizer:
        """Reads tokenizer.json, and where present tokenizer_config.json and generation_config.json.

        ``model`` is the manifest's record; it fills in what the files do not say. Raises BundleError naming the file.
        """
        folder = Path(folder)
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise BundleError(f"{path} is missing; put it beside the checkpoint or graph and export or fold again")
        try_tokenizer(path)
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises bare Exception
            raise BundleError(f"{path} cannot be read by tokenizers {tokenizers.__version__}: {e}; copy the bundle again") from None
        backend.no_truncation()
        backend.no_padding()
        config = read_tokenizer_config(folder)
        # Not a part of tokenizer.json: special tokens inside a text are read as any other text.
        backend.encode_special_tokens = config.get("split_special_tokens") is True
        named = {name: backend.token_to_id(token) for name, token in special_tokens(config).items()}
        bos, eos, pad = (named.get(f"{kind}_token") for kind in ("bos", "eos", "pad"))
        # What the manifest records is all of it, except in bundles that were written when it held the generation config's only.
        stated = _eos_ids(_stated(folder / GENERATION_FILE), folder / GENERATION_FILE)
        recorded = () if model is None else model.eos_token_ids
        stop = {*recorded, *stop_token_ids(generation=stated, config=None, tokenizer=eos)}
        if model is not None:
            bos = model.bos_token_id if bos is None else bos
            pad = pad if model.pad_token_id is None else model.pad_token_id
        return cls(
            backend=backend,
            bos_token_id=bos,
            eos_token_id=min(stop, default=None) if eos is None else eos,
            pad_token_id=pad,
            stop_token_ids=frozenset(stop),
            special_token_ids=frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special),
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids. A rendered chat template writes its special tokens itself: encode it without adding any.

        Which tokens are added is said by tokenizer.json alone: beside that file, transformers 5 ignores the config's add_bos_token.
        """
        with _text_alone():
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_prompt(self, text: str) -> list[int]:
        """A prompt outside a chat template: the tokenizer's special tokens in front, and no end behind it."""
        return without_added_end(self.encode(text), self.encode(text, add_special_tokens=False), self.stop_token_ids)

    def encode_marked(self, text: str, *, add_special_tokens: bool = True) -> tuple[list[int], tuple[int, ...]]:
        """(``encode_prompt`` of a prompt without its marks, or a rendered one as it is; the numbers of its marked tokens).

        Raises InputError for marks that runtimes/text/marks.py refuses.
        """
        plain, spans = without_marks(text)
        ids = self.encode_prompt(plain) if add_special_tokens else self.encode(plain, add_special_tokens=False)
        with _text_alone():
            offsets = self.backend.encode(plain, add_special_tokens=add_special_tokens).offsets
        return ids, marked_tokens(offsets[: len(ids)], spans)

    def encode_text(self, text: str, pair: str | None = None, *, most: int | None = None) -> EncodedText:
        """A classifier's text, or pair of texts, with the special tokens that frame them; cut to ``most`` tokens from the longer one's end,
        as transformers does."""
        with _text_alone():
            encoding = self.backend.encode(text, pair)
            if most is not None and len(encoding) > most:
                self.backend.enable_truncation(most)
                try:
                    encoding = self.backend.encode(text, pair)
                finally:
                    self.backend.no_truncation()
        return EncodedText(ids=tuple(encoding.ids), types=tuple(encoding.type_ids))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)


@contextmanager
def _text_alone() -> Iterator[None]:
    try:
        yield
    except TypeError:
        raise InputError("the text holds half of a surrogate pair (\\ud800 to \\udfff), which is no character") from None


class Detokenizer:
    """Text piece by piece: with context c, ``"".join(pieces) == decode(c + tokens)[len(decode(c)):]``.

    A token is not text by itself: a character's bytes can be spread over several tokens, and SentencePiece-style decoders strip the
    space before the first one. So each piece is the difference of two decodes over a short window, and nothing is given out
    while the window ends inside a character.
    """

    def __init__(self, tokenizer: Tokenizer, context: Iterable[int] = (), *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        # Special tokens are dropped here, not by decode: a window of nothing but special tokens would look like the start of a text.
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        before = [i for i in context if i not in self._skipped]
        windows = (before[-size:] for size in (*CONTEXT_TOKENS, len(before) + 1))
        # None fits a prompt that is cut inside a character: what follows cannot be told from its last bytes.
        self._window = next((w for w in windows if not self._decode(w).endswith(REPLACEMENT)), [])
        self._given = len(self._window)

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is incomplete."""
        if token in self._skipped:
            return ""
        self._window.append(token)
        piece = self._difference()
        if not piece or piece.endswith(REPLACEMENT):
            return ""
        # The tokens of the last piece are the context of the next one.
        self._window = self._window[self._given :]
        self._given = len(self._window)
        return piece

    def finish(self) -> str:
        """What is left at the end: bytes that never became a character."""
        piece = self._difference()
        self._given = len(self._window)
        return piece

    def _difference(self) -> str:
        return self._decode(self._window)[len(self._decode(self._window[: self._given])) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False) if ids else ""


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with the special tokens of an older special_tokens_map.json where it does not name them."""
    return _stated(folder / SPECIAL_TOKENS_FILE) | _stated(folder / CONFIG_FILE)


def special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """``bos_token``, ``eos_token``, ... of a tokenizer config, stored as strings or as ``{"content": ...}``.

    Raises BundleError for one that is no text.
    """
    extra = config.get("extra_special_tokens")
    named = {**config, **(extra if isinstance(extra, dict) else {})}
    contents = {k: v.get("content") if isinstance(v, dict) else v for k, v in named.items() if k.endswith("_token")}
    tokens = {k: v for k, v in contents.items() if isinstance(v, str)}
    for name, token in tokens.items():
        try:
            token.encode()
        except UnicodeEncodeError:
            raise BundleError(
                f"{CONFIG_FILE}: {name} holds half of a surrogate pair, which is no character; copy the bundle again"
            ) from None
    return tokens


def _stated(path: Path) -> dict[str, Any]:
    """The file's JSON object, empty where it is absent. Raises BundleError where it is damaged."""
    return read_json_object(path, BundleError, "copy the bundle again") if path.is_file() else {}


def _eos_ids(config: dict[str, Any], path: Path) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    ids = listed(value)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise BundleError(f"{path}: eos_token_id is {value!r}, expected a token id or a list of them")
    return ids


def check_token_ids(ids: Sequence[int], vocab_size: int, what: str) -> list[int]:
    """``ids`` as a list; raises InputError for none at all and for ids outside [0, vocab_size)."""
    ids = [int(i) for i in ids]
    if not ids:
        raise InputError(f"{what} has no tokens; a decoder needs at least one, pass some text or a bos token")
    outside = next((i for i in ids if not 0 <= i < vocab_size), None)
    if outside is not None:
        raise InputError(f"{what} holds token id {outside}, outside the model's vocabulary of {vocab_size}")
    return ids
