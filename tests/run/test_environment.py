import errno
import subprocess

import pytest

from hipexp.config.compose import compose
from hipexp.config.schema import Model
from hipexp.run import environment, identity
from hipexp.run.ledger import RunFailed


def test_versions_and_machine_are_recorded():
    found = environment.describe_environment()
    assert found["packages"]["torch"] == identity.machine()["torch"]
    assert found["threads"] >= 1
    assert found["device"]


def test_changed_files_show_in_the_git_revision(tmp_path):
    assert environment.git_revision(tmp_path) is None

    def git(*words):
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(tmp_path), *words], check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    assert len(environment.git_revision(tmp_path)) == 40
    (tmp_path / "file").write_text("2")
    assert environment.git_revision(tmp_path).endswith("+")


def test_a_package_inside_another_repository_has_no_revision(tmp_path):
    subprocess.run(["git", "-C", str(tmp_path), "init"], check=True, capture_output=True)
    (tmp_path / "mine").touch()
    subprocess.run(["git", "-C", str(tmp_path), "add", "."], check=True)
    subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(tmp_path), "commit", "-m", "1"], check=True, capture_output=True
    )
    (tmp_path / "venv").mkdir()
    assert environment.git_revision(tmp_path)
    assert environment.git_revision(tmp_path / "venv") is None


def test_a_full_disk_leaves_no_half_table(tmp_path, monkeypatch):
    def write(table, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", write)
    head, card = {"run_key": "", "model": "", "pipeline": None}, {"suite": "", "protocol": "", "metric": {}}
    with pytest.raises(RunFailed, match=r"disk full: cannot write .*records\.parquet"):
        environment.write_records(tmp_path, head, card, [])
    assert list(tmp_path.iterdir()) == []


def test_the_key_follows_the_models_content(experiment, model_folder):
    before = identity.key_of(experiment())
    (model_folder / "README.md").write_text("words do not matter")
    assert identity.key_of(experiment()) == before
    (model_folder / "weights").write_bytes(b"1")
    changed = identity.key_of(experiment())
    (model_folder / "weights").write_bytes(b"2")
    assert len({before, changed, identity.key_of(experiment())}) == 3


def test_the_key_does_not_follow_the_models_place_or_the_tracker(experiment, model_folder):
    one, other = experiment(), experiment()
    other.model = Model(path=str(model_folder.rename(model_folder.with_name("elsewhere"))), name="renamed")
    other.track.name = "wandb"
    key = identity.key_of(other)
    model_folder.with_name("elsewhere").rename(model_folder)
    assert identity.key_of(one) == key


@pytest.mark.parametrize(
    "words",
    [
        ["task.length_tok=12288"],
        ["task.subtasks=[passkey,number_string,kv_retrieval]"],
        ["model.trained_tok=6144"],
        ["model=hf", "model.path=hipexp/needle/model"],
        ["model.dtype=float32"],
    ],
)
def test_what_is_written_out_is_the_same_run_as_what_is_left_open(words):
    assert identity.key_of(compose(["+pipeline=3stage", *words])) == identity.key_of(compose(["+pipeline=3stage"]))


def test_a_grid_by_its_defaults_and_a_group_that_is_off():
    grid = ["task=passkey", "+pipeline=3stage"]
    said = identity.key_of(compose([*grid, "task.lengths_tok=[6144,12288,24576]"]))
    assert identity.key_of(compose(grid)) == said != identity.key_of(compose([*grid, "task.lengths_tok=[6144]"]))
    off = identity.key_of(compose([*grid, "pipeline.layers.early.range=''"]))
    assert identity.key_of(compose([*grid, "~pipeline.layers.early"])) == off


def test_number_formats_come_from_the_model_where_they_are_not_given(model_folder):
    assert identity.dtype_of(Model(path=str(model_folder), dtype="float16")) == "float16"
    assert identity.dtype_of(Model(path=str(model_folder))) == "float32"
    (model_folder / "config.json").write_text('{"dtype": "bfloat16"}')
    assert identity.dtype_of(Model(path=str(model_folder))) == "bfloat16"
