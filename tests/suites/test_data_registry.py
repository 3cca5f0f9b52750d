import re

import pytest

from hipexp.config.schema import ConfigError
from hipexp.suites.data.registry import FILES, SUBTASKS, file_named, files_of, is_published, missing, size_text
from hipexp.suites.sample import DataMissing


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.suite}-{file.name}")
def test_every_file_is_one_of_a_kind(file):
    """A download may be continued only where the address or the digest says that the bytes are the same."""
    assert re.fullmatch("[0-9a-f]{40}", file.source.revision) or file.sha256
    assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
    assert set(file.subtasks) <= set(SUBTASKS[file.suite])
    assert file.size_bytes > 0
    assert not file.name.startswith((".", "/")) and ".." not in file.name
    if file.made_from:
        assert FILES.index(file_named(file.suite, file.made_from)) < FILES.index(file)
        assert set(file.subtasks) <= set(file_named(file.suite, file.made_from).subtasks)
    else:
        assert file.url.startswith("https://")
        assert file.url.endswith(f"/{file.path}")
        assert file.source.revision in file.url or file.sha256


def test_names_and_digests_are_unique():
    assert len({(file.suite, file.name) for file in FILES}) == len(FILES)
    digests = [file.sha256 for file in FILES if file.sha256]
    assert len(set(digests)) == len(digests)


def test_prompts_are_all_pinned():
    assert all(file.sha256 for file in FILES if file.prompts)
    assert {file.suite for file in FILES if file.prompts} == set(SUBTASKS)


def test_addresses_are_those_of_their_hosts():
    assert file_named("infbench", "passkey.jsonl").url == (
        "https://huggingface.co/datasets/xinrongzhang2022/InfiniteBench/resolve/90f0394333616266d9fe85824ceaf505093cbaa5/passkey.jsonl"
    )
    assert file_named("longbench", "dataset2prompt.json").url == (
        "https://raw.githubusercontent.com/THUDM/LongBench/2e00731f8d0bff23dc4325161044d0ed8af94c1e/LongBench/config/dataset2prompt.json"
    )
    assert "/media/NVIDIA/RULER/" in file_named("ruler", "english_words.json").url
    assert file_named("ruler", "squad.json").url == "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json"


def test_suites_have_the_published_subtasks():
    assert {suite: len(names) for suite, names in SUBTASKS.items()} == {"infbench": 12, "longbench": 21 + 13, "longbench2": 1, "ruler": 13}
    assert all(len(set(names)) == len(names) for names in SUBTASKS.values())


def test_subtasks_take_what_they_need_and_no_more():
    assert [file.name for file in files_of("infbench", ["passkey"]) if not file.prompts] == ["passkey.jsonl"]
    assert [file.name for file in files_of("ruler", ["vt", "qa_2"]) if not file.prompts] == ["hotpotqa.json"]
    assert [file.name for file in files_of("longbench", ["qasper_e"]) if not file.prompts] == ["data.zip"]
    assert len(files_of("infbench")) == 12 + 3
    essays = {file.name for file in files_of("ruler", ["niah_multiquery"])}
    assert {"PaulGrahamEssays.json", "essays.parquet", "punkt_tab.zip", "punkt_tab/english/collocations.tab"} < essays


def test_a_file_is_as_well_known_as_what_it_is_made_from():
    assert is_published(file_named("ruler", "punkt_tab/english/collocations.tab"))
    assert not is_published(file_named("ruler", "PaulGrahamEssays.json"))
    assert is_published(file_named("longbench", "data.zip"))


@pytest.mark.parametrize("ask", [lambda: files_of("latency"), lambda: files_of("infbench", ["qasper"]), lambda: file_named("ruler", "x")])
def test_unknown_names_are_refused(ask):
    with pytest.raises(ConfigError):
        ask()


def test_sizes_are_said_in_decimal_units():
    assert [size_text(n) for n in (0, 999, 1000, 12_345, 863_000_000, 2_500_000_000)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "12 kB",
        "863 MB",
        "2.5 GB",
    ]


def test_what_is_missing_is_said_in_one_line():
    error = missing(file_named("longbench", "data.zip"), "is not there")
    assert isinstance(error, DataMissing)
    assert str(error) == (
        "longbench needs data.zip (zai-org/LongBench, revision 5e628be450b7, 114 MB), which is not there; run: python -m hipexp data pull longbench"
    )
