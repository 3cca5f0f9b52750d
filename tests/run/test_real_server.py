"""A real OpenAI-compatible server on this machine, `transformers serve`, with the embedded model."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

import hipexp
from hipexp.config.compose import compose
from hipexp.config.schema import ConfigError
from hipexp.run.ledger import read_json, read_rows
from hipexp.run.point import execute

for package in ("fastapi", "uvicorn", "openai", "accelerate"):
    pytest.importorskip(package, reason="needs `pip install 'transformers[serving]'`")
MODEL = Path(hipexp.__file__).parent / "needle" / "model"
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
TASK = ["task=infbench", "task.length_tok=1500", "task.samples=2"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="the embedded model is not trained yet: make needle"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded model with a chat template that adds the start token and nothing else, as its tokenizer does."""
    folder = Path(shutil.copytree(MODEL, tmp_path_factory.mktemp("served") / "needle"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def url(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    run = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, "-c", run, *words], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(1200):
            assert server.poll() is None, "the server ended"
            try:
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def run(monkeypatch, tmp_path, url, folder):
    """``run("model.prompt=chat")``: the run folder of the served model."""
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path))
    return lambda *words: execute(compose(["model=openai", f"model.base_url={url}", f"model.path={folder}", *TASK, *words]))


def told(folder):
    return [(row["subtask"], row["sample"], row["prediction"], row["score"], row["context_tok"]) for row in read_rows(folder)]


@pytest.mark.parametrize("words", [(), ("model.concurrent=2", "model.server=two"), ("model.prompt=chat",)], ids=["one", "two", "chat"])
def test_a_served_model_says_what_it_says_here(run, words):
    served, here = run(*words), execute(compose(["model=needle", *TASK]))
    assert told(served) == told(here)
    assert all(row["served_tok"] == row["context_tok"] for row in read_rows(served))
    assert read_json(served / "summary.json")["scores"] == read_json(here / "summary.json")["scores"]
    card = read_json(served / "card.json")
    assert card["model"]["served"]["prompt"] == ("chat" if "model.prompt=chat" in words else "text")  # this server takes no token ids


def test_what_the_server_refuses_is_said_in_its_words(run, folder):
    with pytest.raises(ConfigError, match=r"answered 400 Bad Request: .*prompt must be a string.*; if .*: model\.prompt=text"):
        run("model.prompt=tokens")
    with pytest.raises(ConfigError, match="Server is pinned to"):
        run("model.path=another", f"model.tokenizer={folder}")


def test_ruler_by_the_command_line(url, folder, tmp_path):
    pytest.importorskip("lm_eval")
    words = ["model=openai", f"model.base_url={url}", f"model.path={folder}", "task=ruler", "task.subtasks=[vt]", "task.length_tok=1024"]
    env = os.environ | {"HIPEXP_RUNS": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "hipexp", *words, "task.samples=1"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = Path(done.stdout.splitlines()[-1])
    assert made.name.startswith("needle_served_")
    assert json.loads((made / "summary.json").read_text())["edition"]
