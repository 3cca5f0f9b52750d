"""What the suites read: published data and official prompt files, each at one revision of one source.

Every file can be told from any other by its revision (a commit in its address) or by its SHA-256, most by both. Digests of prompt files
were computed by us, those of data are the ones that several unrelated projects publish for the same revision. Files without a digest are
recorded when they are first downloaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from hipexp.config.schema import ConfigError
from hipexp.suites.sample import DataMissing

HOSTS = {
    "hub": "https://huggingface.co/datasets/{source}/resolve/{revision}/{path}",
    "github": "https://raw.githubusercontent.com/{source}/{revision}/{path}",
    "github-lfs": "https://media.githubusercontent.com/media/{source}/{revision}/{path}",
    "squad": "https://rajpurkar.github.io/SQuAD-explorer/dataset/{path}",
}


@dataclass(frozen=True)
class Source:
    """A repository or data set at one revision (a commit, except for ``host="squad"``); ``host`` is who serves its files."""

    host: str
    name: str
    revision: str
    licence: str


@dataclass(frozen=True)
class DataFile:
    """One file of a suite, and where it comes from.

    ``name``        its path in the suite's folder; ``path`` that in its source
    ``size_bytes``  its size; ``exact`` says whether to the byte
    ``sha256``      its digest; None if nobody publishes one
    ``prompts``     whether it holds official prompts or settings, not samples
    ``subtasks``    who needs it; empty for all of the suite
    ``member``      of an archive: where the rows of a subtask are in it
    ``made_from``   the file of the same suite that it is made from, where it is not downloaded
    """

    suite: str
    name: str
    source: Source
    path: str
    size_bytes: int
    sha256: str | None = None
    exact: bool = False
    prompts: bool = False
    subtasks: tuple[str, ...] = ()
    member: str | None = None
    made_from: str | None = None

    @property
    def url(self) -> str:
        """Its address."""
        source = self.source
        return HOSTS[source.host].format(source=source.name, revision=source.revision, path=self.path)

    @property
    def size(self) -> str:
        """Its size as one would say it."""
        return ("" if self.exact else "about ") + size_text(self.size_bytes)

    @property
    def command(self) -> str:
        """What fetches it."""
        return f"python -m hipexp data pull {self.suite}" + (f" subtask={self.subtasks[0]}" if self.subtasks else "")


LONGBENCH_E = (
    *("qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum"),
    *("passage_count", "passage_retrieval_en", "lcc", "repobench-p"),
)
LONGBENCH = (
    *("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh", "hotpotqa", "2wikimqa", "musique", "dureader", "gov_report", "qmsum"),
    *("multi_news", "vcsum", "trec", "triviaqa", "samsum", "lsht", "passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
    *("lcc", "repobench-p"),
)
ESSAY_TASKS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
PUNKT_ENGLISH = {"abbrev_types.txt": 600, "collocations.tab": 600, "ortho_context.tab": 236_000, "sent_starters.txt": 200}
# Bytes of each task's rows, rounded as its data set page gives them.
INFBENCH = {
    "math_calc": 6_000_000,
    "math_find": 41_000_000,
    "longbook_sum_eng": 79_000_000,
    "code_run": 83_000_000,
    "longdialogue_qa_eng": 84_000_000,
    "kv_retrieval": 105_000_000,
    "longbook_choice_eng": 186_000_000,
    "code_debug": 200_000_000,
    "passkey": 277_000_000,
    "number_string": 277_000_000,
    "longbook_qa_eng": 298_000_000,
    "longbook_qa_chn": 863_000_000,
}
INFBENCH_SHA256 = {"longbook_qa_eng": "7f53a3aabd5445fa29f168914f13569c348406cfc88a3e495f3f2c13a0966ca4"}
SUBTASKS: dict[str, tuple[str, ...]] = {
    "infbench": tuple(INFBENCH),
    "longbench": (*LONGBENCH, *(f"{name}_e" for name in LONGBENCH_E)),
    "longbench2": ("longbench2",),
    "ruler": (
        *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
        *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
    ),
}
GENERATED = ("ruler",)  # suites whose samples are made here; their files are only what samples are made of

INFBENCH_CODE = Source("github", "OpenBMB/InfiniteBench", "51d9b37b0f1790ead936df2243abbf7f0420e439", "none at this commit")
INFBENCH_DATA = Source("hub", "xinrongzhang2022/InfiniteBench", "90f0394333616266d9fe85824ceaf505093cbaa5", "that of each book and package")
INFLLM_CODE = Source("github", "thunlp/InfLLM", "12b70798f56e56ebb23c53c7018091a3f540a028", "MIT")
LONGBENCH_CODE = Source("github", "THUDM/LongBench", "2e00731f8d0bff23dc4325161044d0ed8af94c1e", "MIT")
LONGBENCH_DATA = Source("hub", "zai-org/LongBench", "5e628be450b7e67fb7ae6e201bd6d8f7056f7672", "that of each data set in it")
LONGBENCH2_DATA = Source("hub", "zai-org/LongBench-v2", "2b48e494f2c7a2f0af81aae178e05c7e1dde0fe9", "Apache-2.0")
RULER_CODE = Source("github", "NVIDIA/RULER", "c3f5e3b4f87f97e048793bb510a3a6b19a46bf3a", "Apache-2.0")
RULER_WORDS = replace(RULER_CODE, host="github-lfs")
ESSAYS = Source("hub", "baber/paul_graham_essays", "792d672b77d1a67720f7e9820d646358fc18792e", "none stated; their author's")
NLTK = Source("github", "nltk/nltk_data", "4f15a3d89eefe9748ec1c05be495d91289197155", "none stated")
SQUAD = Source("squad", "SQuAD", "dev-v2.0", "CC BY-SA 4.0")
HOTPOT = Source("hub", "namlh2004/hotpotqa", "7e54db4656209750ff487f6fdf8e39a66dba136b", "CC BY-SA 4.0")


def _prompts(suite: str, name: str, source: Source, path: str, size_bytes: int, sha256: str) -> DataFile:
    return DataFile(suite, name, source, path, size_bytes, sha256, prompts=True)


def _ruler(name: str, source: Source, path: str, size_bytes: int, subtasks: tuple[str, ...], sha256: str) -> DataFile:
    return DataFile("ruler", name, source, path, size_bytes, sha256, exact=True, subtasks=subtasks)


# Prompts of a suite first, then its data from small to large: what goes wrong goes wrong early.
FILES: tuple[DataFile, ...] = (
    _prompts(
        *("infbench", "prompt.py", INFBENCH_CODE, "src/prompt.py", 10_000),
        "d49a6891d6bc61522bb428d66a07b092a6bb6bc195aa0fe103eddd6bb39c7f10",
    ),
    _prompts(
        *("infbench", "infllm/dataset2prompt.json", INFLLM_CODE, "benchmark/config/dataset2prompt.json", 8_000),
        "e0e3b6b138d31e43b893d489b9381a0f4ad49a66bf816c1968422a3dd7891302",
    ),
    _prompts(
        *("infbench", "infllm/dataset2maxlen.json", INFLLM_CODE, "benchmark/config/dataset2maxlen.json", 1_000),
        "8023cc42baa56672c248da1e8147ef3bc5b85d68f53b5c0a7208defa6f5209fd",
    ),
    *(
        DataFile("infbench", f"{task}.jsonl", INFBENCH_DATA, f"{task}.jsonl", size_bytes, INFBENCH_SHA256.get(task), subtasks=(task,))
        for task, size_bytes in INFBENCH.items()
    ),
    _prompts(
        *("longbench", "dataset2prompt.json", LONGBENCH_CODE, "LongBench/config/dataset2prompt.json", 10_000),
        "56d22ad4f382169c2b8a11ff4c982a4a1bea096c8152b0f0b85b64686b157c30",
    ),
    _prompts(
        *("longbench", "dataset2maxlen.json", LONGBENCH_CODE, "LongBench/config/dataset2maxlen.json", 1_000),
        "72966b3c0933e214591637fb085798c5e687ebff4ddaab5d99bbc31120532022",
    ),
    DataFile(
        *("longbench", "data.zip", LONGBENCH_DATA, "data.zip", 113_932_529),
        "cb45b11a4133c6bc1d6a44b0f8e701335ff1e543195db1103472e575857f7f64",
        exact=True,
        member="data/{subtask}.jsonl",
    ),
    _prompts(
        *("longbench2", "0shot.txt", LONGBENCH_CODE, "prompts/0shot.txt", 300),
        "68a162252bc9ff71d5d7abca3d69bb31aac3c35f832d657a2866f2018b8a6950",
    ),
    _prompts(
        *("longbench2", "0shot_cot.txt", LONGBENCH_CODE, "prompts/0shot_cot.txt", 200),
        "6cc33d92fd8f611662b756c1f10f302c541ca005b58c46d5f3188ac3a939bfe8",
    ),
    _prompts(
        *("longbench2", "0shot_cot_ans.txt", LONGBENCH_CODE, "prompts/0shot_cot_ans.txt", 300),
        "85ec59df4ac0e27aabbc619a7ca5cf3ae1787dd5a76cf51a18944eb52c91955f",
    ),
    DataFile(
        *("longbench2", "data.json", LONGBENCH2_DATA, "data.json", 465_490_535),
        "15d61c22d92c96900b3c4948b6aeea218d3214b676a65df48e7b8555604c7fe2",
        exact=True,
    ),
    _prompts(
        *("ruler", "constants.py", RULER_CODE, "scripts/data/synthetic/constants.py", 3_000),
        "6296e901d495ec6200dc3f68993ea13d8282e3c0dbe1a8c47967f111105d1fde",
    ),
    _prompts(
        *("ruler", "synthetic.yaml", RULER_CODE, "scripts/synthetic.yaml", 3_000),
        "34bc71dcacdc41a829a170f04b528fbf48d62c616338005ab4991680fbf8cb0b",
    ),
    DataFile("ruler", "essays.parquet", ESSAYS, "essays.parquet", 2_000_000, subtasks=ESSAY_TASKS),
    DataFile("ruler", "PaulGrahamEssays.json", ESSAYS, "", 3_000_000, subtasks=ESSAY_TASKS, made_from="essays.parquet"),
    _ruler(
        *("punkt_tab.zip", NLTK, "packages/tokenizers/punkt_tab.zip", 4_319_076, ESSAY_TASKS),
        "e57f64187974277726a3417ca6f181ec5403676c717672eef6a748a7b20e0106",
    ),
    *(
        DataFile("ruler", f"punkt_tab/english/{name}", NLTK, "", size_bytes, subtasks=ESSAY_TASKS, made_from="punkt_tab.zip")
        for name, size_bytes in PUNKT_ENGLISH.items()
    ),
    _ruler(
        *("squad.json", SQUAD, "dev-v2.0.json", 4_370_528, ("qa_1",)),
        "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8",
    ),
    _ruler(  # words for cwe at 128K and beyond
        *("english_words.json", RULER_WORDS, "scripts/data/synthetic/json/english_words.json", 8_564_991, ("cwe",)),
        "affcd6d45fdf3cc843d585c99c97ad615094e760e6c4756b654bab6c73bc2eca",
    ),
    _ruler(
        *("hotpotqa.json", HOTPOT, "hotpot_dev_distractor_v1.json", 61_065_698, ("qa_2",)),
        "e3da074df24e8369009918aa5cdbdd254dadcde4c63f7569d36afd6f2268caa8",
    ),
)


def size_text(size_bytes: int) -> str:
    """Bytes in the decimal unit one would say them in."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:.{1 if size_bytes < 10 * unit else 0}f} {name}"
    return f"{size_bytes} B"


def check_suite(suite: str) -> str:
    """``suite`` itself, or ``ConfigError``."""
    if suite not in SUBTASKS:
        raise ConfigError(f"suite {suite} has no data of its own; those that have are {', '.join(SUBTASKS)}")
    return suite


def files_of(suite: str, subtasks: Iterable[str] = ()) -> tuple[DataFile, ...]:
    """The files that ``subtasks`` of a suite need, all of them if none is named. Raises ``ConfigError`` for an unknown name."""
    known, asked = SUBTASKS[check_suite(suite)], set(subtasks)
    for name in sorted(asked.difference(known)):
        raise ConfigError(f"{suite} has no subtask {name}; use one of {', '.join(known)}")
    return tuple(file for file in FILES if file.suite == suite and (not asked or not file.subtasks or asked.intersection(file.subtasks)))


def file_named(suite: str, name: str) -> DataFile:
    """One file of a suite; raises ``ConfigError`` for an unknown name."""
    files = {file.name: file for file in files_of(suite)}
    if name not in files:
        raise ConfigError(f"{suite} has no file {name}; it has {', '.join(files)}")
    return files[name]


def is_published(file: DataFile) -> bool:
    """Whether a digest of the file, or of what it is made from, is published."""
    return (file_named(file.suite, file.made_from) if file.made_from else file).sha256 is not None


def missing(file: DataFile, problem: str) -> DataMissing:
    """The error for a file that cannot be used: what it is, how large, ``problem`` and the command that fetches it."""
    what = f"{file.suite} needs {file.name} ({file.source.name}, revision {file.source.revision[:12]}, {file.size}), which {problem}"
    return DataMissing(f"{what}; run: {file.command}")
