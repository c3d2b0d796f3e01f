"""What a name that is not known may have meant."""

import difflib
from collections.abc import Iterable

# Names that transformers, its example scripts and PEFT use, and what they are called here.
_ELSEWHERE = {
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "lr": "learning_rate",
    "train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "warmup_steps": "warmup_ratio",
    "fp16": "bf16",
    "eval_strategy": "eval_steps",
    "evaluation_strategy": "eval_steps",
    "save_strategy": "save_steps",
    "load_best_model_at_end": "load_best",
    "disable_tqdm": "no_progress",
    "output_dir": "output",
    "overwrite_output_dir": "overwrite",
    "resume_from_checkpoint": "resume",
    "task_name": "task",
    "dataset_name": "dataset",
    "dataset_config_name": "dataset_config",
    "text_column_name": "words_column",
    "label_column_name": "tags_column",
    "max_train_samples": "max_train_examples",
    "max_eval_samples": "max_eval_examples",
    "max_seq_len": "max_length",
    "version_2_with_negative": "unanswerable",
    "prompt_length": "num_virtual_tokens",
    "r": "lora_rank",
    "lora_r": "lora_rank",
    # Values of task and method.
    "ner": "token_classification",
    "pos": "token_classification",
    "chunking": "token_classification",
    "tagging": "token_classification",
    "srl": "semantic_role_labeling",
    "qa": "question_answering",
    "swag": "multiple_choice",
    "classification": "text_classification",
    "sequence_classification": "text_classification",
    "sentiment": "text_classification",
    "regression": "text_classification",
    "prefix_tuning": "p_tuning_v2",
    "full": "fine_tuning",
}


def close_to(name: str, known: Iterable[str]) -> list[str]:
    """The known names that another may have meant, up to three, the likeliest first.

    Blanks, dashes and case do not matter: "--max_lenght" is close to "max-length".
    """
    by_plain = {_plain(other): other for other in known}
    own = _plain(name)
    meant = _ELSEWHERE.get(own)
    if meant in by_plain:
        return [by_plain[meant]]
    return [by_plain[other] for other in difflib.get_close_matches(own, by_plain, 3, 0.5)]


def hint(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name; nothing when none is close."""
    close = close_to(name, known)
    return f"; close to it are {close}" if close else ""


def _plain(name: str) -> str:
    return name.strip("- ").lower().replace("-", "_").replace(" ", "_")
