"""Where the demo keeps its model, adapters and records."""

from pathlib import Path

from demo.tasks import TASKS

DEMO_DIR = Path(__file__).parent
MODEL_DIR = DEMO_DIR / "model"
ADAPTERS_DIR = DEMO_DIR / "adapters"
NINTH_DIR = DEMO_DIR / "ninth-adapter"
TRAINING_FILE = DEMO_DIR / "training.json"
EXPECTED_FILE = DEMO_DIR / "expected.json"
README_FILE = DEMO_DIR / "README.md"


def adapter_dir(name: str) -> Path:
    return ADAPTERS_DIR / name if name in TASKS else NINTH_DIR
