import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def seeded():
    torch.set_num_threads(2)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def refs():
    """Outputs of TRL 1.12, NLTK 3.10.4, rouge-score 0.1.2 and the Vendi score on small inputs; each entry
    names its definition."""
    return json.loads((Path(__file__).parent / "refs.json").read_text())
