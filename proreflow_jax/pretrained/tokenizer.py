"""CLIP's tokenizer from a diffusers folder, by the `tokenizers` library: prompts -> token ids.

Old folders hold vocab.json + merges.txt, new ones tokenizer.json; both give the same ids as transformers' CLIPTokenizer.
"""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from proreflow_jax import MissingFile, UserError

log = logging.getLogger(__name__)
WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
RULE = "--config.model.path"
START, END = "<|startoftext|>", "<|endoftext|>"


class PromptTokenizer(NamedTuple):
    """Prompts to ids of one fixed length."""

    length: int
    encode: Callable[[Sequence[str]], Int[np.ndarray, "b s"]]


def build(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """CLIP's byte-level BPE: lower case, whitespace collapsed, `</w>` at the end of words, start and end tokens around."""
    bpe = models.BPE(
        vocab=vocabulary, merges=merges, unk_token=END, continuing_subword_prefix="", end_of_word_suffix="</w>", fuse_unk=False
    )
    tokenizer = Tokenizer(bpe)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    split = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    around = (END, vocabulary[END]), (START, vocabulary[START])
    tokenizer.post_processor = processors.RobertaProcessing(*around, trim_offsets=False, add_prefix_space=False)
    tokenizer.add_special_tokens([START, END])
    return tokenizer


def _read(folder: Path) -> Tokenizer:
    try:
        return _built(folder)
    except FileNotFoundError:
        raise
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{folder} holds no readable tokenizer ({error}): fetch it again, or name another {RULE}") from None


def _built(folder: Path) -> Tokenizer:
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        _check_merges(vocabulary, merges)
        return build(vocabulary, merges)
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    raise MissingFile(f"{folder} holds neither vocab.json + merges.txt nor tokenizer.json: name another {RULE}")


def _check_merges(vocabulary: dict[str, int], merges: Sequence[tuple[str, ...]]) -> None:
    """Raises ValueError if words of the vocabulary have no merge: prompts would fall into letters, and draw something else.

    One letter needs none, nor do words in angle brackets, which are special or were added.
    """
    merged = {"".join(pair) for pair in merges}
    longer = [word for word in vocabulary if len(word.removesuffix("</w>")) > 1 and not (word[0] == "<" and word[-1] == ">")]
    if lacking := [word for word in longer if word not in merged]:
        raise ValueError(f"merges.txt lacks {len(lacking)} of {len(longer)} merges, that of {lacking[0]!r} among them")


def _text(value: str | dict | None, default: str) -> str:
    return default if value is None else value["content"] if isinstance(value, dict) else value


def load_tokenizer(*folders: Path) -> PromptTokenizer:
    """Reads the tokenizer of a diffusers folder, or SDXL's two.

    Returns a PromptTokenizer: `encode` gives ids (b, length) int32, padded as the folder says. Longer prompts are cut and
    keep the end token; the first one is named in a warning. Two tokenizers' ids lie side by side, `length` is the sum. Raises
    FileNotFoundError if a folder holds no tokenizer. Raises ValueError if the padding or end token has no id, or if two
    tokenizers differ in length.
    """
    warned: list[bool] = []
    each = [_load(folder, warned) for folder in folders]
    if len({one.length for one in each}) > 1:
        raise UserError(f"{folders[0].parent}: its tokenizers take {' and '.join(str(one.length) for one in each)} tokens")
    together = lambda prompts: np.concatenate([one.encode(prompts) for one in each], axis=1)
    return each[0] if len(each) == 1 else PromptTokenizer(sum(one.length for one in each), together)


def _load(folder: Path, warned: list[bool]) -> PromptTokenizer:
    tokenizer = _read(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    special = folder / "special_tokens_map.json"
    config = (json.loads(special.read_text(encoding="utf-8")) if special.is_file() else {}) | config
    length = min(int(config.get("model_max_length", 77)), 10_000)
    pad = _text(config.get("pad_token"), END)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    pad_id, end_id = tokenizer.token_to_id(pad), tokenizer.token_to_id(END)
    if pad_id is None or end_id is None:
        raise UserError(f"{folder}: {(pad if pad_id is None else END)!r} is no token of the vocabulary: --config.model.path")
    tokenizer.add_special_tokens([pad])  # SD 2.1 pads with "!": so "!" in a prompt is this token too

    def encode(prompts: Sequence[str]) -> Int[np.ndarray, "b s"]:
        rows = np.full((len(prompts), length), pad_id, np.int32)
        for row, encoding in zip(rows, tokenizer.encode_batch(list(prompts)), strict=True):
            ids = encoding.ids
            if len(ids) > length:
                if not warned:
                    log.warning("a prompt of %d tokens is cut to the model's %d (said once)", len(ids), length)
                    warned.append(True)
                ids = [*ids[: length - 1], end_id]
            row[: len(ids)] = ids
        return rows

    return PromptTokenizer(length, encode)


def learn(texts: Sequence[str], merges: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-pair encoding in CLIP's form, learned from texts: (vocabulary, merges), at most `merges` of them.

    The vocabulary is CLIP's: 256 bytes, the same with `</w>`, one entry a merge, start token, end token; so every text
    has ids, seen or not.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    start = alphabet + [f"{letter}</w>" for letter in alphabet]
    tokenizer = build({word: i for i, word in enumerate([*start, START, END])}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + merges, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    learned = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]][:merges]
    words = [*start, *dict.fromkeys(a.removesuffix("</w>") + b for a, b in learned), START, END]
    return {word: i for i, word in enumerate(words)}, learned


def write_tokenizer(folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]], length: int) -> None:
    """Writes the tokenizer folder that diffusers and transformers read: vocab.json, merges.txt and its configs."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, **special}
    for name, value in (("vocab", vocabulary), ("tokenizer_config", config), ("special_tokens_map", special)):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def vocabulary_size(folder: Path) -> int:
    """Entries of a written vocabulary."""
    return len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
