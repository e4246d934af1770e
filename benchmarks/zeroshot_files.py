"""Invented texts in the published formats of the data sets of zeroshot.toml, and a tokenizer.

Layouts are those of the Hugging Face hub (parquet, one file or several), of the cache of `datasets`
(arrow), of OpenAI's lambada_test.jsonl, and plain text with a sentence in each line.
"""

import json
import pathlib

import numpy as np

from esolm_jax.data.detokenizers import detokenizer

STEMS = "the of a one new small river old light stone garden market letter number winter".split()
STEMS += "house paper window morning tenor voice village report question matter system".split()
LABELS = 4  # of AG News
NOT_READ = "a split that the suite does not score"


def sentences(seed: int, count: int) -> list[str]:
    """Sentences of 4 to 24 words, which follow each other by a random bigram table."""
    table = np.random.default_rng(0).dirichlet(np.full(len(STEMS), 0.15), len(STEMS))
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        word, words = int(rng.integers(len(STEMS))), []
        for _ in range(rng.integers(4, 25)):
            words.append(STEMS[word])
            word = int(rng.choice(len(STEMS), p=table[word]))
        texts.append(" ".join(words))
    return texts


def paragraphs(seed: int, count: int, size: int, ending: str = " . ") -> list[str]:
    """Documents of `size` sentences."""
    texts = sentences(seed, count * size)
    return [ending.join(texts[i : i + size]) + ending.rstrip() for i in range(0, len(texts), size)]


def ptb(seed: int, count: int) -> list[str]:
    return [f" {text} 's N <unk> $ N did n't " for text in sentences(seed, count)]


def news(seed: int, count: int) -> list[str]:
    """As LM1B."""
    return [f'" {text} " , it does n\'t .' for text in sentences(seed, count)]


def training_texts(count: int) -> list[str]:
    """About `count` sentences of all kinds, detokenized."""
    part = count // 4
    made = sentences(100, part) + paragraphs(101, part // 4, 4)
    for name, texts in (
        ("ptb", ptb(102, part)),
        ("wikitext", wikitext(103, part // 6)),
        ("lm1b", news(104, part // 2)),
    ):
        made += map(detokenizer(name), texts)
    order = np.random.default_rng(0).permutation(len(made))
    return [made[i] for i in order if made[i].strip()]


def wikitext(seed: int, count: int) -> list[str]:
    """Lines with their newlines: blank ones, titles, and paragraphs."""
    texts = paragraphs(seed, count, 3)
    lines = ([f" = Title {i} = \n", "", f' {t} " the 4 @-@ 5 " ( one ) \n', ""]
             for i, t in enumerate(texts))  # fmt: skip
    return ["", *(line for group in lines for line in group)]


def write_parquet(path: pathlib.Path, columns: dict[str, list]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path)


def write_arrow(path: pathlib.Path, columns: dict[str, list]) -> None:
    """Arrow's stream format, as `datasets` caches it."""
    import pyarrow as pa

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


def write_lines(path: pathlib.Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_json_lines(path: pathlib.Path, texts: list[str]) -> None:
    write_lines(path, [json.dumps({"text": text}) for text in texts])


def papers(seed: int, count: int) -> dict[str, list]:
    """The columns of scientific_papers."""
    return {
        "article": paragraphs(seed, count, 40, " .\n"),
        "abstract": sentences(seed + 1, count),
        "section_names": ["introduction\nresults"] * count,
    }


def write(root: pathlib.Path, scale: int) -> None:
    """Writes the files of all data sets of zeroshot.toml; about `scale` sentences each."""
    write_lines(root / "ptb_text_only" / "validation.txt", ptb(1, scale))
    write_lines(root / "ptb_text_only" / "train.txt", [NOT_READ])
    first = root / "wikitext" / "wikitext-103-raw-v1"
    write_parquet(first / "validation-00000-of-00001.parquet", {"text": wikitext(2, scale // 3)})
    write_parquet(first / "train-00000-of-00001.parquet", {"text": [NOT_READ]})
    second = root / "wikitext" / "wikitext-2-raw-v1" / "0.0.0"
    write_arrow(second / "wikitext-validation.arrow", {"text": wikitext(3, scale // 3)})
    write_arrow(second / "wikitext-test.arrow", {"text": [NOT_READ]})
    write_parquet(root / "lm1b" / "plain_text" / "test" / "0000.parquet", {"text": news(4, scale)})
    write_parquet(root / "lm1b" / "plain_text" / "train" / "0000.parquet", {"text": [NOT_READ]})
    stories = [f"“ {text} ” said the tenor" for text in paragraphs(5, scale // 4, 4)]
    write_json_lines(root / "lambada" / "lambada_test.jsonl", stories)
    texts = sentences(6, scale)
    columns = {"text": texts, "label": [i % LABELS for i in range(len(texts))]}
    write_parquet(root / "ag_news" / "data" / "test-00000-of-00001.parquet", columns)
    for part in (0, 1):
        name = f"validation-0000{part}-of-00002.parquet"
        columns = papers(7 + 2 * part, max(1, scale // 80))
        write_parquet(root / "scientific_papers" / "arxiv" / name, columns)
    pubmed = root / "scientific_papers" / "pubmed" / "scientific_papers-validation.arrow"
    write_arrow(pubmed, papers(11, max(1, scale // 40)))


def write_tokenizer(folder: pathlib.Path, texts: list[str], size: int) -> None:
    """A byte-level BPE of at most `size` tokens, trained on the texts: vocab.json and merges.txt,
    as GPT-2's."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True)
    made.model.save(str(folder))
