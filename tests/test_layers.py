"""Who may import whom: the layers of the packages, read off the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = {"hipexp", "hipexp.config", "hipexp.output"}

# Folder or file: what it may import at all, and what it may import only inside a function. The longest match counts.
# Prefixes allow what lies below them; the standard library is always allowed.
RULES: dict[str, tuple[set[str], set[str]]] = {
    "kernels/hipexp_kernels": ({"hipexp_kernels", "torch", "triton"}, set()),
    "hipexp/__init__.py": (set(), set()),
    "hipexp/__main__.py": ({"hipexp.cli"}, set()),
    "hipexp/output.py": (set(), set()),
    "hipexp/cli.py": (CONFIG, {"hipexp.completion", "hipexp.run"}),
    "hipexp/completion.py": (CONFIG, {"hipexp.cli", "hipexp.report.runs", "hipexp.run.ledger"}),
    "hipexp/doctor.py": (CONFIG, {"hipexp.run.fits", "torch"}),
    "hipexp/library.py": (CONFIG | {"hipexp.hf"}, {"transformers"}),
    "hipexp/config": ({"hipexp.config"}, {"hipexp.suites"}),
    "hipexp/config/schema.py": (set(), set()),
    "hipexp/config/compose.py": ({"hipexp.config", "hydra", "omegaconf", "yaml"}, set()),
    "hipexp/cache": ({"hipexp.cache", "hipexp.config.schema", "hipexp_kernels", "torch"}, set()),
    "hipexp/cache/policies.py": ({"hipexp.config.schema"}, set()),
    "hipexp/cache/replay.py": ({"hipexp.cache.policies", "hipexp.cache.traces"}, set()),
    "hipexp/cache/traces.py": ({"hipexp.config.schema"}, set()),
    "hipexp/attention": (
        {"hipexp.attention", "hipexp.cache", "hipexp.config.convert", "hipexp.config.schema", "hipexp_kernels", "torch"},
        set(),
    ),
    "hipexp/hf": (CONFIG | {"hipexp.attention", "hipexp.cache", "hipexp.hf", "hipexp_kernels", "torch", "transformers"}, {"tqdm"}),
    "hipexp/needle": (CONFIG | {"hipexp.needle", "hipexp.suites", "tokenizers", "torch", "tqdm", "transformers"}, set()),
    "hipexp/suites": (
        {"hipexp.config.schema", "hipexp.suites", "numpy"},
        {"datasets", "huggingface_hub", "jieba", "jinja2", "lm_eval", "nltk", "rouge_score"},
    ),
    "hipexp/track": (CONFIG | {"hipexp.suites", "hipexp.track"}, {"wandb"}),
    "hipexp/report": (
        CONFIG | {"hipexp.report", "hipexp.run.ledger", "hipexp.suites"},
        {"duckdb", "matplotlib", "numpy", "pandas", "pyarrow", "yaml"},
    ),
    "hipexp/run": (
        CONFIG | {"hipexp.report", "hipexp.run", "hipexp.suites", "hipexp.track"},
        {"hipexp.hf", "hipexp.attention", "hipexp.cache", "huggingface_hub", "numpy", "pyarrow", "tokenizers", "torch", "tqdm", "yaml"},
    ),
    "hipexp/repro": (
        CONFIG | {"hipexp.report", "hipexp.repro", "hipexp.run", "hipexp.suites", "yaml"},
        {"huggingface_hub", "numpy"},
    ),
    "hipexp/tune": (
        CONFIG | {"hipexp.report", "hipexp.run", "hipexp.suites", "hipexp.tune"},
        {"hipexp.hf", "hipexp.attention", "numpy", "torch", "yaml"},
    ),
    "hipexp/tune/study.py": (CONFIG | {"hipexp.run", "hipexp.tune"}, {"optuna"}),
    "hipexp/run/contestants.py": ({"hipexp.run", "hipexp_kernels", "torch"}, {"flash_attn", "flashinfer"}),
    "hipexp/run/replay.py": (
        CONFIG | {"hipexp.cache.policies", "hipexp.cache.replay", "hipexp.cache.traces", "hipexp.report", "hipexp.run"},
        {"hipexp.hf", "tqdm"},
    ),
    "hipexp/run/link_traffic.py": (
        CONFIG | {"hipexp.cache.traffic", "hipexp.hf", "hipexp.report", "hipexp.run", "torch", "transformers"},
        set(),
    ),
    "hipexp/run/timing.py": ({"hipexp.config.compiler", "hipexp.run", "torch"}, set()),
    "hipexp/run/probes.py": ({"hipexp.run", "hipexp_kernels", "torch", "triton"}, set()),
    "hipexp/run/selected.py": ({"hipexp.attention", "hipexp.run", "hipexp_kernels", "torch"}, {"flashinfer"}),
    "hipexp/run/attention_latency.py": (CONFIG | {"hipexp.attention", "hipexp.cache", "hipexp.run", "hipexp_kernels", "torch"}, set()),
    "hipexp/run/offload_latency.py": (CONFIG | {"hipexp.attention", "hipexp.cache", "hipexp.run", "torch"}, set()),
    "hipexp/run/decode_speed.py": (CONFIG | {"hipexp.attention", "hipexp.cache", "hipexp.hf", "hipexp.run", "torch", "transformers"}, set()),
    "hipexp/run/gpu.py": (CONFIG | {"hipexp.attention", "hipexp.report", "hipexp.run", "torch", "yaml"}, set()),
}
# A GPU machine may lack these: what runs there does not import them at load time.
OFTEN_MISSING = {"hydra", "omegaconf", "datasets", "wandb", "pyarrow", "matplotlib"}
RUNS_ON_A_GPU_MACHINE = (
    "hipexp_kernels",
    "hipexp.attention.inputs",
    "hipexp.attention.layer",
    "hipexp.cache.resident",
    "hipexp.hf",
    "hipexp.config.schema",
    "hipexp.library",
    "hipexp.attention.recall",
    "hipexp.run.contestants",
    "hipexp.run.gpu",
    "hipexp.run.latency",
    "hipexp.run.point",
)
SOURCES = sorted([*(ROOT / "hipexp").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module a file imports, and whether it does so when it is loaded; imports for type checkers do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in block.body
    }
    inside = {id(node) for block in ast.walk(tree) if isinstance(block, ast.FunctionDef | ast.AsyncFunctionDef) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in for_types:
            for name in names(node, path):
                yield name, id(node) not in inside


def names(node: ast.Import | ast.ImportFrom, path: Path) -> list[str]:
    """Modules named by an import; ``from hipexp import hf`` names ``hipexp.hf``."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if node.level:
        return [".".join(path.relative_to(ROOT).parts[: -node.level])]
    if node.module == "hipexp":
        return [f"hipexp.{alias.name}" if (ROOT / "hipexp" / alias.name).is_dir() else "hipexp" for alias in node.names]
    return [node.module or ""]


def rule_of(path: Path) -> tuple[set[str], set[str]]:
    relative = path.relative_to(ROOT).as_posix()
    return RULES[max((prefix for prefix in RULES if relative.startswith(prefix)), key=len)]


def allowed(name: str, prefixes: set[str]) -> bool:
    return name.split(".")[0] in sys.stdlib_module_names or any(
        name == prefix or (prefix != "hipexp" and name.startswith(f"{prefix}.")) for prefix in prefixes
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_keep_to_the_rules(path):
    always, lazily = rule_of(path)
    wrong = [name for name, at_load in imports(path) if not allowed(name, always if at_load else always | lazily)]
    assert not wrong, f"{path.relative_to(ROOT)} must not import {', '.join(wrong)} (at load time, unless only listed as lazy)"


def test_what_runs_on_a_gpu_machine_loads_without_the_rest():
    blocked = f"import sys; sys.modules.update(dict.fromkeys({sorted(OFTEN_MISSING)}))"  # None there: importing it fails
    loads = "; ".join(f"import {name}" for name in RUNS_ON_A_GPU_MACHINE)
    subprocess.run([sys.executable, "-c", f"{blocked}; {loads}"], check=True, cwd=ROOT)


def test_the_folder_of_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "kernels is the import name of a package that transformers looks for"
