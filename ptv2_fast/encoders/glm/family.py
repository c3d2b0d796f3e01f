"""GLM among the families: its masks."""

from typing import Any

from ptv2_fast.encoders.family import Family
from ptv2_fast.encoders.glm.inputs import read_mask
from ptv2_fast.encoders.input_checks import input_tokens


class GLMFamily(Family):
    """Masks that may be the lengths of what all of a text sees, in one of two arguments."""

    def read_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """As that of `Family`, with context_lengths int32 [B] or None."""
        tokens = input_tokens(arguments)
        if tokens is None:
            return arguments
        visible = read_mask(
            arguments.get("attention_mask"),
            arguments.get("context_lengths"),
            tokens.shape[:2],
            tokens.device,
        )
        read = {"attention_mask": visible.tokens, "context_lengths": visible.context_lengths}
        return {**arguments, **read}

    def check_tokenizer(self, tokenizer: Any) -> None:
        """As that of `Family`: classifiers read [CLS], which has to be the first token."""
        first, ids = tokenizer.cls_token_id, tokenizer("a")["input_ids"]
        if first is None or [*ids][:1] != [first]:
            raise ValueError(
                "tokenizer: expected one that puts its cls_token in front of a text, whose state "
                f"GLM's classifiers read, got a {type(tokenizer).__name__} with the cls_token "
                f"{tokenizer.cls_token!r} that puts {ids} for 'a'"
            )
