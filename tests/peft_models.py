"""Models of PEFT with a prefix."""

import copy

import peft
import torch

from tests.models import P

TASKS = {
    "sequence": "SEQ_CLS",
    "token": "TOKEN_CLS",
    "question": "QUESTION_ANS",
    "bare": "FEATURE_EXTRACTION",
}


def peft_model(plain, head: str, **fields):
    """A prefix of PEFT with a random head on a copy of a model."""
    config = peft.PrefixTuningConfig(task_type=TASKS[head], num_virtual_tokens=P, **fields)
    model = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model
