import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "run"))
import run_fixtures

fake, model_folder = run_fixtures.fake, run_fixtures.model_folder
