"""Every way to write an override, and every value as a sweep agent or Python prints it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hipexp.config.compose import compose, compose_point, read_line, sweep_points
from hipexp.config.overrides import normalise
from hipexp.config.schema import ConfigError, PruneRope, Stage

S3 = "+pipeline=3stage"


@pytest.mark.parametrize(
    "word", ["pipeline=3stage", "+pipeline=3stage", "++pipeline=3stage", "--pipeline=3stage", "--+pipeline=3stage", "pipeline='3stage'"]
)
def test_spellings_of_a_pipeline(word):
    assert compose([word]) == compose([S3])


@pytest.mark.parametrize("word", ["+pipeline=none", "pipeline=null", "--pipeline=None", "++pipeline=dense"])
def test_spellings_of_dense(word):
    assert compose([word]) == compose([])


@pytest.mark.parametrize("prefix", ["", "+", "++", "--"])
def test_prefixes_mean_the_same_for_other_groups_and_keys(prefix):
    experiment = compose(
        [S3, f"{prefix}task=passkey", f"{prefix}offload=None", f"{prefix}pipeline.stages.0.keep_tok=16384", f"{prefix}seed=3"]
    )
    assert (experiment.task.name, experiment.pipeline.stages[0].keep_tok, experiment.seed) == ("passkey", 16384, 3)


@pytest.mark.parametrize("value", ["4096", "4096.0", "4.096e3", " 4096", "'4096'"])
def test_whole_numbers(value):
    keep = compose([S3, f"pipeline.stages.2.keep_tok={value}"]).pipeline.stages[2].keep_tok
    assert (keep, type(keep)) == (4096, int)


@pytest.mark.parametrize("value", ["4096.5", "True", "abc", "nan", "inf", "[1]", "", "None"])
def test_what_is_no_whole_number(value):
    with pytest.raises(ConfigError, match=r"pipeline\.stages\.2\.keep_tok=.* must be a whole number"):
        compose([S3, f"pipeline.stages.2.keep_tok={value}"])


@pytest.mark.parametrize("value", ["None", "null"])
def test_nothing(value):
    task = compose([f"task.length_tok={value}", f"task.subtasks={value}", f"model.revision={value}"]).task
    assert task.length_tok is None and task.subtasks is None


@pytest.mark.parametrize(
    "value", ["['passkey', 'kv_retrieval']", "[passkey,kv_retrieval]", "passkey,kv_retrieval", "('passkey','kv_retrieval')"]
)
def test_lists(value):
    assert compose([f"task.subtasks={value}"]).task.subtasks == ["passkey", "kv_retrieval"]


def test_lists_of_numbers():
    task = compose(["task=passkey", "task.lengths_tok=[8192.0, 1.6384e4]", "task.depths=[0, 0.5]"]).task
    assert task.lengths_tok == [8192, 16384] and task.depths == [0.0, 0.5]
    assert compose(["task=passkey", "task.lengths_tok=8192"]).task.lengths_tok == [8192]


def test_dictionaries_as_python_prints_them():
    stages = [{"chunk_tok": 64, "keep_tok": 2048.0, "rope": "native"}, {"chunk_tok": 16, "keep_tok": 1024, "rope": None}]
    experiment = compose([S3, "pipeline.layers.early.range=", f"pipeline.stages={stages}"])
    assert experiment.pipeline.stages == [Stage(64, 2048, rope=PruneRope.native), Stage(16, 1024)]


@pytest.mark.parametrize("value", ["{'range': '3-', 'stages': {2: {'keep_tok': 1024.0}}}", "{range: 3-, stages: {'2': {keep_tok: 1024}}}"])
def test_a_new_layer_group(value):
    by_value = compose([S3, f"pipeline.layers.late={value}"])
    by_key = compose([S3, "pipeline.layers.late.range=3-", "pipeline.layers.late.stages.2.keep_tok=1024"])
    assert by_value == by_key
    assert [plan.stages[2].keep_tok for plan in by_key.pipeline.plan(5)] == [4096, 4096, 4096, 1024, 1024]


def test_a_layer_group_can_be_emptied_or_removed():
    emptied = [compose([S3, f"pipeline.layers.early.range={value}"]) for value in ("", "''")]
    assert emptied[0] == emptied[1]
    assert emptied[0].pipeline.plan(5) == compose([S3, "~pipeline.layers.early"]).pipeline.plan(5)


@pytest.mark.parametrize("value", ["0,2,4", "'0,2,4'"])
def test_a_range_with_commas(value):
    assert compose([S3, f"pipeline.layers.early.range={value}"]).pipeline.layers["early"].range == "0,2,4"


@pytest.mark.parametrize("words", [["--cfg=job"], ["-c=job"], ["--cfg", "job"], ["-c", "job"]])
def test_showing_the_configuration_takes_no_other_word(words):
    line = normalise([*words, S3, "seed=3"], {"pipeline": ["3stage"]})
    assert line.show and line.overrides == ["+pipeline=3stage", "++seed=3"]


def test_models_that_are_no_option_are_called_by_their_path(model_path):
    assert compose(["model=hf", "model.path=Qwen/Qwen3-0.6B"]).model.name == "Qwen3-0.6B"
    assert compose(model_path).model.name == "five-layers"
    assert compose([*model_path, "model.name=mine"]).model.name == "mine"


def test_brackets_as_errors_print_them():
    assert compose([S3, "pipeline.stages[2].keep_tok=1024"]) == compose([S3, "pipeline.stages.2.keep_tok=1024"])


@settings(deadline=None)
@given(
    st.text(st.characters(blacklist_categories=("Cs", "Cc", "Zs", "Zl", "Zp")), min_size=1).filter(
        lambda t: "${" not in t and t not in ("None", "null", "???")
    )
)
def test_text_arrives_as_it_was_written(text):
    quoted = text[0] == text[-1] and text[0] in "'\"" and len(text) > 1
    project = compose([f"track.project={text}"]).track.project
    assert project == (text[1:-1] if quoted else text)


UNKNOWN = {
    "+pipeline.stages.0.foo=1": "pipeline.stages.0.foo is unknown; known here: chunk_tok, keep_tok",
    "pipeline.stages.0.kep_tok=1": "pipeline.stages.0.kep_tok is unknown; did you mean keep_tok?",
    "++pipeline.sinks_tok=1": "pipeline.sinks_tok is unknown; did you mean sink_tok?",
    "pipeline.layers.early.stages.2.keep=1": "pipeline.layers.early.stages.2.keep is unknown; did you mean keep_tok?",
    "pipeline.layers.early={rang: 1}": "pipeline.layers.early.rang is unknown; did you mean range?",
    "pipeline.stages=[{chunk: 1}]": "pipeline.stages[0].chunk is unknown",
    "pipeline.sink_tok.more=1": "pipeline.sink_tok.more is unknown; pipeline.sink_tok is a single value without parts",
    "pipeline.stages.first.keep_tok=1": "pipeline.stages.first must number an entry of pipeline.stages from 0, as in pipeline.stages.0",
    "+task.sampels=3": "task.sampels is unknown; did you mean samples?",
    "pipline=3stage": "pipline is unknown; did you mean pipeline?",
    "sead=3": "sead is unknown; did you mean seed?",
    "task=infbenhc": "task=infbenhc is unknown; did you mean infbench?",
    "~task.samples": "~task.samples cannot be removed; only a layer group can",
    "--verbose": "--verbose is unknown; settings are written key=value, as in seed=1; see --help",
    "=3": "'=3' is not key=value",
    "word": "'word' is not key=value",
    "pipeline=2stage": "pipeline=2stage chooses pipeline a second time, after pipeline=3stage; leave one of them out",
    "task.samples=1,2": "task.samples=1,2 holds several values where one is due; add -m",
    "task=infbench,passkey": "task=infbench,passkey names several; add -m",
    "pipeline.stages.0=5": "pipeline.stages.0=5 must be given field by field",
}


@pytest.mark.parametrize("word, message", UNKNOWN.items())
def test_unknown_words(word, message):
    with pytest.raises(ConfigError) as caught:
        compose([S3, word])
    assert message in str(caught.value)


@pytest.mark.parametrize("more", [[], ["pipeline=None"]])
def test_pipeline_keys_need_a_pipeline(more):
    with pytest.raises(
        ConfigError, match=r"pipeline\.sink_tok=64 changes a pipeline, but none is chosen; choose one, as in \+pipeline=3stage"
    ):
        compose(["pipeline.sink_tok=64", *more])


def test_unknown_keys_in_a_file_are_refused(tmp_path, monkeypatch):
    for group, text in {"model": "path: org/m", "offload": "name: none", "task": "samplez: 3", "track": "name: local"}.items():
        (tmp_path / group).mkdir()
        (tmp_path / group / {"model": "needle", "offload": "none", "task": "infbench", "track": "local"}[group]).with_suffix(
            ".yaml"
        ).write_text(text)
    (tmp_path / "config.yaml").write_text("defaults: [{model: needle}, {offload: none}, {task: infbench}, {track: local}, _self_]")
    monkeypatch.setenv("HIPEXP_CONF", str(tmp_path))
    with pytest.raises(ConfigError, match=r"task\.samplez is unknown; did you mean samples\?"):
        compose([])


def test_a_folder_without_configuration_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HIPEXP_CONF", str(tmp_path))
    with pytest.raises(ConfigError, match=r"HIPEXP_CONF=.* must be a folder with a config\.yaml in it"):
        compose([])


def test_points_of_a_sweep():
    options = {
        "model": ["needle"],
        "pipeline": ["2stage", "3stage", "dense"],
        "offload": ["none"],
        "task": ["infbench"],
        "track": ["local"],
    }
    words = ["-m", "pipeline=None,2stage", "task.length_tok=8192.0,None", "seed=1", "task.subtasks=passkey,kv_retrieval"]
    line = normalise(words, options)
    assert line.sweep
    points = [tuple(point) for point in sweep_points(line.overrides)]
    assert len(points) == len(set(points)) == 8
    experiments = [compose(list(point)) for point in points]
    assert {e.pipeline and e.pipeline.name for e in experiments} == {None, "2stage"}
    assert {e.task.length_tok for e in experiments} == {8192, None}
    assert {tuple(e.task.subtasks) for e in experiments} == {("passkey",), ("kv_retrieval",)}


def test_a_pattern_in_a_sweep_names_the_options_it_matches():
    options = {"pipeline": ["2stage", "3stage", "3stage_fast"]}
    assert normalise(["-m", "pipeline=glob(3*)"], options).overrides == ["+pipeline=3stage,3stage_fast"]
    with pytest.raises(ConfigError, match=r"pipeline=glob\(x\*\) is unknown; known here: 2stage"):
        normalise(["-m", "pipeline=glob(x*)"], options)


@pytest.mark.parametrize("word", ["seed=interval(1,2)", "seed=glob(1*)"])
def test_what_a_sweep_cannot_list_is_refused(word):
    with pytest.raises(ConfigError, match="cannot be listed point by point; write the values with commas"):
        sweep_points([word])


def test_a_pipeline_key_does_not_go_with_a_dense_point():
    with pytest.raises(
        ConfigError, match=r"sink_tok=64 changes a pipeline, and pipeline=dense,3stage has a point without; run dense by itself"
    ):
        normalise(["-m", "+pipeline=dense,3stage", "pipeline.sink_tok=64"], {"pipeline": ["3stage", "dense"]})


def own_pipeline(tmp_path, name="mine"):
    path = tmp_path / f"{name}.yaml"
    path.write_text(
        "stages: [{chunk_tok: 32, keep_tok: 256}]\nsink_tok: 64\nlayers: {early: {range: '0', stages: {'0': {keep_tok: 512}}}}\n"
    )
    return path


def test_a_pipeline_may_be_a_file(tmp_path):
    path = own_pipeline(tmp_path)
    pipeline = compose([f"+pipeline={path}", "pipeline.window_tok=128", "pipeline.stages.0.keep_tok=128"]).pipeline
    assert (pipeline.name, pipeline.sink_tok, pipeline.window_tok) == ("mine", 64, 128)
    assert [plan.stages[0].keep_tok for plan in pipeline.plan(2)] == [512, 128]
    path.write_text(path.read_text().replace("sink_tok: 64", "sink_tok: 32"))
    assert compose([f"+pipeline={path}"]).pipeline.sink_tok == 32  # read anew


def test_a_file_takes_part_in_a_sweep(tmp_path):
    line = read_line(["-m", f"pipeline={own_pipeline(tmp_path)},3stage"])
    names = [compose_point(point).pipeline.name for point in sweep_points(line.overrides)]
    assert names == ["mine", "3stage"]


def test_files_that_are_no_pipeline(tmp_path):
    def refused(name, message):
        with pytest.raises(ConfigError, match=message):
            compose([f"+pipeline={tmp_path}/{name}.yaml"])

    refused("mine", "must be a file, and there is none")
    named = {"3stage": "has the name of another pipeline, 3stage; rename", "a b": "letters, digits, '_' and '-'"}
    named |= dict.fromkeys(["12", "1e3", "null", "true", "nan"], "must be called by a word")
    for name, message in named.items():
        own_pipeline(tmp_path, name)
        refused(name, message)
    own_pipeline(tmp_path).write_bytes(b"\xff\xfe")
    refused("mine", "mine.yaml cannot be read .*; it must be a YAML file")
    own_pipeline(tmp_path).write_text("stages: [")
    refused("mine", "mine.yaml line 1 is no YAML")
    own_pipeline(tmp_path).write_text("sinks_tok: 3")
    refused("mine", r"pipeline\.sinks_tok is unknown; did you mean sink_tok\?")
