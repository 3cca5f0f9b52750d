import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import run_fixtures

fake, model_folder, experiment, offloaded = run_fixtures.fake, run_fixtures.model_folder, run_fixtures.experiment, run_fixtures.offloaded
