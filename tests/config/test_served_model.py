"""A model that a server runs: what is refused before anything is asked, and what need not be on this machine."""

import json

import pytest

from hipexp.config.check import check_model
from hipexp.config.compose import compose
from hipexp.config.model import ModelFacts
from hipexp.config.schema import ConfigError

URL = "model.base_url=http://localhost:8000/v1"
SERVED = ["model=openai", URL, "model.path=org/model"]
CASES = {
    "no server": (["model=openai", "model.path=org/model"], "model.base_url is not set and must be text"),
    "no model": (["model=openai", URL], "model.path is not set and must be text"),
    "a pipeline": (
        [*SERVED, "+pipeline=3stage"],
        "pipeline=3stage changes the attention of a model, and a server's cannot be changed from here",
    ),
    "latency": (
        [*SERVED, "task=latency"],
        "task=latency measures inside of a model, and a served one (model.base_url) shows only its answers",
    ),
    "latency alone": ([*SERVED, "task=latency", "task.geometry=llama31_8b"], "task=latency measures inside of a model"),
    "recall": ([*SERVED, "task=recall", "+pipeline=3stage"], "load the model here for that, as in model=hf"),
    "batch": (
        [*SERVED, "task.batch=2"],
        "task.batch=2 is for a model that is loaded here; for several requests at once use model.concurrent",
    ),
    "dtype": (
        [*SERVED, "model.dtype=float16"],
        "model.dtype=float16 is for a model that is loaded here, and a server has chosen; leave it out",
    ),
    "chunk": ([*SERVED, "model.prefill_chunk_tok=64"], "model.prefill_chunk_tok=64 is for a model that is loaded here"),
    "prompt": ([*SERVED, "model.prompt=ids"], "model.prompt=ids is unknown; use auto or tokens or text or chat"),
    "none at once": ([*SERVED, "model.concurrent=0"], "model.concurrent=0 must be at least 1"),
    "too many at once": ([*SERVED, "model.concurrent=5000"], "model.concurrent=5000 must be at most 1024"),
    "no time": ([*SERVED, "model.timeout_s=0"], "model.timeout_s=0 must be at least 1"),
    "no scheme": (
        [*SERVED, "model.base_url=localhost:8000"],
        "model.base_url=localhost:8000 is no address of a server; write it like http",
    ),
    "no host": ([*SERVED, "model.base_url=http:///v1"], "is no address of a server"),
    "a strange port": ([*SERVED, "model.base_url=http://localhost:80a/v1"], "model.base_url has a host or a port that is none"),
    "no id": ([*SERVED[:2], "model.path="], "model.path= must be the model's id"),
    "an empty part of a host": ([*SERVED, "model.base_url=http://a..b/v1"], "model.base_url has a host or a port that is none"),
    "a long part of a host": ([*SERVED, f"model.base_url=http://{'a' * 64}.org/v1"], "model.base_url has a host or a port that is none"),
    "a host in other letters": ([*SERVED, "model.base_url=http://bücher.example/v1"], "must be ASCII, as addresses are sent"),
    "a path in other letters": ([*SERVED, "model.base_url=http://localhost/größe/v1"], "must be ASCII, as addresses are sent"),
    "a control character": ([*SERVED, "model.base_url=http://localhost/\x7f"], "is no address of a server"),
    "a scheme in capitals": ([*SERVED, "model.base_url=HTTP://localhost:8000/v1"], "is no address of a server; write it like http://"),
    "an endpoint": (
        [*SERVED, "model.base_url=http://localhost:8000/v1/completions"],
        "must end before /completions, which is added here; use http://localhost:8000/v1",
    ),
    "an endpoint of chats": (
        [*SERVED, "model.base_url=http://localhost:8000/v1/chat/completions/"],
        "must end before /chat/completions, which is added here; use http://localhost:8000/v1",
    ),
    "offload": ([*SERVED, "offload=host"], "offload=host moves a model's keys and values, and a server's are its own"),
    "prompt of a loaded model": (["model.prompt=chat"], "model.prompt=chat is for a served model (model=openai); leave it out"),
    "tokenizer of a loaded model": (["model.tokenizer=org/model"], "model.tokenizer=org/model is for a served model"),
    "requests to a loaded model": (["model.concurrent=2"], "model.concurrent=2 is for a served model"),
}


@pytest.mark.parametrize("argv, message", CASES.values(), ids=CASES)
def test_refused(argv, message):
    with pytest.raises(ConfigError) as caught:
        compose(argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://me:secret@host/v1", "http://secret@host/v1", "https://host/v1?api-key=secret", "https://host/v1#secret"]
)
def test_credentials_in_the_address_are_refused_and_not_repeated(url):
    with pytest.raises(ConfigError, match="put the key into OPENAI_API_KEY") as caught:
        compose([*SERVED[:1], SERVED[2], f"model.base_url={url}"])
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://localhost:8000/v1", "https://host.example/some/v1/", "http://[::1]:8000/v1", "http://10.0.0.7"])
def test_addresses_of_servers(url):
    assert compose([*SERVED[:1], SERVED[2], f"model.base_url={url}"]).model.base_url == url


def test_a_served_model_is_called_by_the_end_of_its_id():
    assert compose(SERVED).model.name == "model"
    assert compose([*SERVED, "model.name=mine"]).model.name == "mine"


def test_a_tokenizer_is_here_or_on_a_hub_or_asked_for(tmp_path):
    assert check_model(compose(SERVED)) is None
    assert check_model(compose([*SERVED, "model.path=gpt", "model.tokenizer=org/tokenizer"])) is None
    with pytest.raises(ConfigError, match=r"model\.path=gpt is no folder here and no hub id .*; name the served model's tokenizer"):
        check_model(compose([*SERVED, "model.path=gpt"]))
    with pytest.raises(ConfigError, match=r"model\.tokenizer=nowhere is no folder here and no hub id .*; check the path"):
        check_model(compose([*SERVED, "model.path=gpt", "model.tokenizer=nowhere"]))


@pytest.mark.parametrize("inside", [True, False])
def test_a_folder_has_no_revision(tmp_path, inside):
    folder = "hipexp/needle/model" if inside else str(tmp_path)
    with pytest.raises(ConfigError, match=rf"model\.revision=main is for a tokenizer on a hub, and model\.tokenizer={folder} is a folder"):
        check_model(compose([*SERVED, f"model.tokenizer={folder}", "model.revision=main", "model.trained_tok=512"]))
    assert check_model(compose([*SERVED, "model.tokenizer=org/tokenizer", "model.revision=main"])) is None


def test_the_trained_length_of_a_served_model(tmp_path):
    words = [*SERVED, "model.path=gpt", f"model.tokenizer={tmp_path}"]
    with pytest.raises(ConfigError, match=r"model\.tokenizer=.* no readable config\.json; set model\.trained_tok"):
        check_model(compose(words))
    assert check_model(compose([*words, "model.trained_tok=4096"])) == ModelFacts(0, 4096)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"max_position_embeddings": 512}}))
    assert check_model(compose(words)) == ModelFacts(0, 512)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"model\.tokenizer=.*: config\.json must give .* set model\.trained_tok"):
        check_model(compose(words))
