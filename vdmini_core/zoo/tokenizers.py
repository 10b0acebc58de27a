"""Writes small tokenizers, in the layout of CLIP's and T5's, that know a list of words and spell all others."""

import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import Unigram

from vdmini_core.artifacts import write_json

CLIP_LENGTH, T5_LENGTH = 77, 32
START, END = "<|startoftext|>", "<|endoftext|>"
PAD, STOP, UNKNOWN = "<pad>", "</s>", "<unk>"
WORD_END = "</w>"
SPACE = "▁"  # before each word, by SentencePiece's convention


def write_clip_tokenizer(folder: Path, words: Iterable[str], length: int = CLIP_LENGTH) -> int:
    """Write vocab.json, merges.txt and tokenizer_config.json of a `CLIPTokenizer`; the number of tokens it knows.

    A text is padded or cut to `length` tokens, start and end included.

    Each of the words (letters only, lower case) is one token; any other text is spelled in single bytes but for
    the longest ending that it shares with a word.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Endings alone are merged, from the right: no merge can then fit in two places of a word.
    endings = {word[start:] + WORD_END: word[start] for word in words for start in range(len(word) - 1)}
    longer = sorted(endings, key=lambda ending: (len(ending), ending))
    tokens = [*alphabet, *(symbol + WORD_END for symbol in alphabet), *longer, START, END]
    merges = [f"{endings[ending]} {ending[1:]}" for ending in longer]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    write_json(folder / "tokenizer_config.json", _config("CLIPTokenizer", length) | special)
    return len(tokens)


def write_t5_tokenizer(folder: Path, words: Iterable[str]) -> int:
    """Write tokenizer.json and tokenizer_config.json of a `T5Tokenizer`; the number of tokens.

    Each of the words is one token; any other is spelled in printable ASCII characters, and what is none of
    these is unknown.
    """
    symbols = string.ascii_letters + string.digits + string.punctuation
    likely = dict.fromkeys((SPACE + word for word in words), -1.0)
    pieces = [(PAD, 0.0), (STOP, 0.0), (UNKNOWN, 0.0), *likely.items(), *((s, -10.0) for s in SPACE + symbols)]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(SPACE, "always")]
    )
    tokenizer.decoder = decoders.Metaspace(SPACE, "always")
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", STOP], special_tokens=[(STOP, 1)])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (PAD, STOP, UNKNOWN)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": PAD, "eos_token": STOP, "unk_token": UNKNOWN, "extra_ids": 0}
    write_json(folder / "tokenizer_config.json", _config("T5Tokenizer", T5_LENGTH) | special)
    return len(pieces)


def _config(name: str, length: int) -> dict[str, Any]:
    return {"tokenizer_class": name, "model_max_length": length}
