"""Save the ninth adapter with peft, as a user would after training: python -m demo.ninth DIR"""

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from demo.paths import MODEL_DIR, NINTH_DIR


def load_ninth_adapter() -> PeftModel:
    """The trained `drop-ends` adapter on its base; slow, so that saving it can be timed alone."""
    base = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    return PeftModel.from_pretrained(base, NINTH_DIR)


def save_adapter(model: PeftModel, directory: str) -> None:
    # peft would otherwise look for the base on the Hub, to see whether its vocabulary grew.
    model.save_pretrained(directory, save_embedding_layers=False)


if __name__ == "__main__":
    save_adapter(load_ninth_adapter(), sys.argv[1])
