"""Models, data sets and texts of published_evaluation.py.

The texts are invented: words in random order, with what the published detokenizers rewrite. They
are written once, in the formats of the data sets, and read by the published code and by ours.
"""

import dataclasses
import itertools
import pathlib
import shutil
import zipfile

import numpy as np

from benchmarks import zeroshot_files

LENGTH = 64  # tokens of a window
ROWS = 6  # windows of an evaluation batch
KAPPA = 0.5
FIXTURES = pathlib.Path(__file__).parents[1] / "tests" / "fixtures" / "golden_eval"
GPT2, BERT = FIXTURES / "tokenizer_bpe", FIXTURES / "tokenizer_wordpiece"
LAMBADA = "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl"
TEXT8_CHARACTERS = 40_000

SIZES = (
    f"model.length={LENGTH}",
    "model=tiny",
    "model.hidden_size=32",
    "model.cond_dim=16",
    "model.n_blocks=2",
    "model.n_heads=4",
    "loader.global_batch_size=4",
    f"loader.eval_batch_size={ROWS}",
)


def esolm(alpha_0: float, *, diffusion: str = "causal", sequential: str = "causal") -> list[str]:
    """Options of the published code for Eso-LM (B), or (A) with mixed2 and mixed, as in its
    training scripts."""
    fields = {
        "alpha_0": alpha_0,
        "batch_split": {0.0: 0.0, 1.0: 1.0}.get(alpha_0, KAPPA),
        "diffusion_shuffle": True,
        "diffusion_attn_mode": diffusion,
        "sequential_shuffle": sequential == "causal",
        "sequential_attn_mode": sequential,
    }
    return ["algo=esolm", *(f"algo.{name}={value}" for name, value in fields.items())]


ALGORITHMS = {
    "eso_b 0.5": esolm(0.5),
    "eso_b 1": esolm(1.0),
    "eso_b 0": esolm(0.0),
    "eso_a 0.5": esolm(0.5, diffusion="mixed2", sequential="mixed"),
    "mdlm": ["algo=mdlm"],
    "ar none": ["algo=ar", "algo.prepend_token=none"],
    "ar bos": ["algo=ar", "algo.prepend_token=bos"],
    "ar mask": ["algo=ar", "algo.prepend_token=mask"],
}
BD3 = {
    f"bd3, blocks of {length}": [
        "algo=bd3lm",
        f"block_size={length}",
        "model.attn_backend=sdpa",
        "model.tie_word_embeddings=False",  # as in its small model
    ]
    for length in (4, 16)
}
ZERO_SHOT = {  # of suite/zeroshot.toml → the published name of the data config
    "ptb": "ptb",
    "wikitext103": "wikitext103",
    "wikitext2": "wikitext2",
    "lm1b": "lm1b-gpt2",
    "lambada": "lambada",
    "ag_news": "ag_news",
    "arxiv": "scientific_papers_arxiv",
    "pubmed": "scientific_papers_pubmed",
}
NO_EOS = (  # as in the published zero-shot script
    "data.insert_valid_eos=False",
    "+data.insert_valid_special=True",
    "+data.insert_train_special=True",
)
BD3_NO_EOS = ("+data.insert_valid_eos=False",)  # as in its own script
OWT = ("data=openwebtext-split", "+data.insert_valid_special=False")


@dataclasses.dataclass(frozen=True)
class Model:
    """A tiny published model.

    Attributes:
      name: a key of ALGORITHMS and the tokenizer, unless that is GPT-2's; or a key of BD3.
      data: options that choose the data that it is trained on, for two steps.
      tokenizer: folder of its tokenizer, or "text8".
    """

    name: str
    data: tuple[str, ...]
    tokenizer: str

    @property
    def is_bd3(self) -> bool:
        """Whether it is a model of the BD3-LM code."""
        return self.name in BD3

    @property
    def algorithm(self) -> list[str]:
        return BD3[self.name] if self.is_bd3 else ALGORITHMS[self.name.partition(", ")[0]]

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "-").replace(",", "")

    @property
    def options(self) -> list[str]:
        """Options of the published code, without those of the data."""
        own = [] if self.tokenizer != str(GPT2) else [f"data.tokenizer_name_or_path={GPT2}"]
        return [*SIZES, *self.algorithm, *own]


@dataclasses.dataclass(frozen=True)
class Case:
    """One evaluation.

    Attributes:
      data: the name of the data set, as in the page.
      options: of the published code. shuffle: windows are shuffled, as in its evaluation.
      processes: its num_proc.
    """

    model: Model
    data: str
    options: tuple[str, ...]
    shuffle: bool = False
    processes: int = 1

    @property
    def name(self) -> str:
        parts = [self.model.folder, self.data, f"p{self.processes}"]
        return "-".join([*parts, "shuffled"] if self.shuffle else parts).replace(" ", "-")

    def request(self) -> dict:
        """What published_validation.py is asked for."""
        workers = f"loader.num_workers={self.processes}"
        overrides = [*self.options, workers, *self.model.options]
        return {"model": self.model.folder, "overrides": overrides, "shuffle": self.shuffle}


def bd3_models() -> list[Model]:
    return [Model(name, ("data=ag_news",), str(GPT2)) for name in BD3]


def models() -> list[Model]:
    gpt2 = [Model(name, ("data=ag_news",), str(GPT2)) for name in ALGORITHMS]
    bert = Model("eso_b 0.5, BERT", ("data=lm1b-wrap",), str(BERT))
    padded = Model("mdlm, BERT", ("data=lm1b",), str(BERT))
    text8 = Model("eso_b 0.5, text8", ("data=text8",), "text8")
    return [*gpt2, bert, padded, text8]


def bd3_cases(made: list[Model]) -> list[Case]:
    """On the zero-shot table."""
    return [
        Case(model, data, (f"data={config}", *BD3_NO_EOS))
        for model in made
        for data, config in ZERO_SHOT.items()
    ]


def cases(made: list[Model]) -> list[Case]:
    """All models with GPT-2's tokenizer on the zero-shot table, and others on the data sets that
    they are trained on."""
    *gpt2, bert, padded, text8 = made
    found = [
        Case(model, data, (f"data={config}", *NO_EOS))
        for model in gpt2
        for data, config in ZERO_SHOT.items()
    ]
    first = gpt2[0]
    ptb = ("data=ptb", *NO_EOS)
    found += [
        Case(first, "ptb", ptb, processes=2),
        Case(first, "ptb", ptb, shuffle=True),
        Case(first, "openwebtext", OWT),
        Case(bert, "lm1b wrapped", bert.data),
        Case(padded, "lm1b padded", (*padded.data, "data.streaming=False")),
        Case(text8, "text8", text8.data),
    ]
    return found


# Texts.

_WORDS = (
    "the harbour lamp was lit before dawn while nobody watched and seven grey boats drifted slowly "
    "past an old stone pier where gulls slept beside nets ropes barrels of salt fish"
).split()
_MARKS = (
    " 's| n't| @-@ | @,@ | @.@ | ; | : | , | . | ! | ? | N | <unk> | ( the pier ) | [ one ] "
    "| \" a lamp \" | ' a boat ' | $ 1 | # 1 | = = = | “so” | it was 7 . | http : / / pier / 7 "
    "| \\/ | s ' "
).split("|")


def _text(rng: np.random.Generator, words: int) -> str:
    chosen = rng.choice(_WORDS, words).tolist()
    marks = np.where(rng.random(words) < 0.4, rng.choice(_MARKS, words), " ").tolist()
    return "".join(word + mark for word, mark in zip(chosen, marks, strict=True)).strip()


def _texts(rng: np.random.Generator, count: int, most: int) -> list[str]:
    return [_text(rng, int(words)) for words in rng.integers(1, most + 1, count)]


def _wikitext(rng: np.random.Generator, count: int) -> list[str]:
    """Rows as in wikitext: blank lines, titles, and lines that end in a newline."""
    rows = ["", f" = {_text(rng, 2)} = \n", ""]
    return [*rows, *(f" {text} \n" for text in _texts(rng, count, 12)), ""]


def write_texts(root: pathlib.Path) -> dict[str, str]:
    """Writes all data sets below `root`, as `evaluate --data_root` reads them; the file of each
    published name."""
    rngs = map(np.random.default_rng, itertools.count(70))  # one per data set
    articles = {"abstract": [""] * 6, "section_names": [""] * 6}
    tables = {  # folder → split, columns
        "ptb_text_only": ("validation", {"sentence": _texts(next(rngs), 2300, 2)}),
        "wikitext/wikitext-103-raw-v1": ("validation", {"text": _wikitext(next(rngs), 30)}),
        "wikitext/wikitext-2-raw-v1": ("validation", {"text": _wikitext(next(rngs), 25)}),
        "lm1b": ("test", {"text": _texts(next(rngs), 40, 14)}),
        "ag_news": ("test", {"text": _texts(next(rngs), 33, 14), "label": [0] * 33}),
        "openwebtext": ("train", {"text": _texts(next(rngs), 20, 40)}),
        "scientific_papers/arxiv": (
            "validation",
            {"article": _texts(next(rngs), 6, 90)} | articles,
        ),
        "scientific_papers/pubmed": (
            "validation",
            {"article": _texts(next(rngs), 6, 90)} | articles,
        ),
    }
    files = {}
    for name, (split, columns) in tables.items():
        path = root / name / f"{split}-00000-of-00001.parquet"
        zeroshot_files.write_parquet(path, columns)
        files[name] = str(path)
    path = root / "lambada" / "lambada_test.jsonl"
    zeroshot_files.write_json_lines(path, _texts(next(rngs), 20, 25))
    return files | {LAMBADA: str(path)}


def write_text8(root: pathlib.Path, caches: list[pathlib.Path]) -> pathlib.Path:
    """text8.zip, and its splits in the caches of the published code, which would download it."""
    rng = np.random.default_rng(8)
    words = " ".join(rng.choice(_WORDS, TEXT8_CHARACTERS // 4))
    characters = words[:TEXT8_CHARACTERS]
    path = root / "text8.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("text8", characters)
    ends = [0, *(TEXT8_CHARACTERS * percent // 100 for percent in (90, 95, 100))]
    for cache in caches:
        folder = cache / "text8" / "raw_data"
        folder.mkdir(parents=True)
        for i, split in enumerate(("train", "validation", "test")):
            (folder / f"text8.{split}.txt").write_text(characters[ends[i] : ends[i + 1]])
    return path


def write_bert(folder: pathlib.Path) -> None:
    """BERT's tokenizer where the published code looks it up: in the working folder."""
    shutil.copytree(BERT, folder / "bert-base-uncased")
