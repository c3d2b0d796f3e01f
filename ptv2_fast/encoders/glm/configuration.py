"""The configuration of GLM (2021), and the published sizes."""

from typing import Any, ClassVar

from transformers import PretrainedConfig

_GPT2, _BERT = 50304, 30592  # rows of the table of words: GPT-2's BPE, BERT's WordPiece
# Name -> layers, width, heads, positions, vocabulary, as THUDM published them.
SIZES = {
    "base": (12, 768, 12, 512, _BERT),  # 110M
    "large": (24, 1024, 16, 512, _BERT),  # 335M
    "410m": (30, 1024, 16, 512, _BERT),
    "515m": (30, 1152, 18, 512, _BERT),
    "large-chinese": (24, 1024, 16, 1024, 50048),
    "2b": (36, 2048, 32, 1024, _GPT2),  # GLM-xlarge of P-Tuning v2's paper
    "10b": (48, 4096, 64, 1024, _GPT2),  # GLM-xxlarge
    "10b-chinese": (48, 4096, 64, 1024, 50048),
}
# Options of the published code -> the value that is served.
_SERVED = {"relative_encoding": False, "block_position_encoding": True, "pool_token": "cls"}


class GLMConfig(PretrainedConfig):
    """Sizes and options of a GLM, named as in the code that came with its checkpoints.

    Not that of transformers' "glm", which is GLM-4. `attention_scale` of the published code is left
    out: it changes the rounding of the scores, not the scores.

    Args:
        num_layers, hidden_size, num_attention_heads, vocab_size: sizes.
        max_sequence_length: positions; both tables have a row more.
        embedding_dropout_prob, attention_dropout_prob, output_dropout_prob: of the sum of
            embeddings, of attention's probabilities, behind both branches of a layer and in heads.
        layernorm_epsilon: of all norms.
        initializer_range: deviation of new weights.
        hidden_act: "gelu_pytorch_tanh", with which the checkpoints were trained, or "gelu", which
            the code on the hub has in its place.
        pool_token: "cls": classifiers read the first token.
        classifier_dropout: of heads; None = output_dropout_prob.
        pad_token_id: of the tokenizer.

    Raises:
        ValueError: for an option of the published code that is not served, naming it, for the
            configuration of another model, and for a width that the heads do not divide.
    """

    model_type = "glm2021"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "max_sequence_length",
        "hidden_dropout_prob": "output_dropout_prob",
        "attention_probs_dropout_prob": "attention_dropout_prob",
    }

    def __init__(
        self,
        num_layers: int = 24,
        hidden_size: int = 1024,
        num_attention_heads: int = 16,
        vocab_size: int = _BERT,
        max_sequence_length: int = 512,
        embedding_dropout_prob: float = 0.1,
        attention_dropout_prob: float = 0.1,
        output_dropout_prob: float = 0.1,
        layernorm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        hidden_act: str = "gelu_pytorch_tanh",
        pool_token: str = "cls",
        classifier_dropout: float | None = None,
        pad_token_id: int | None = None,
        **others: Any,
    ) -> None:
        given = {"pool_token": pool_token, **others}
        for name, served in _SERVED.items():
            if given.get(name, served) != served:
                raise ValueError(f"{name}: expected {served!r} of a GLM, got {given[name]!r}")
        # A folder with the published code says "glm" as well, and where that code is.
        kind, _ = others.pop("model_type", self.model_type), others.pop("auto_map", None)
        if kind != self.model_type and "num_hidden_layers" in others:
            raise ValueError(
                "model_type: expected the configuration of a GLM (2021), got one of "
                f"{kind!r} with num_hidden_layers: GLM-4, say, which transformers has itself"
            )
        self.num_layers = num_layers
        self.hidden_size, self.num_attention_heads = hidden_size, num_attention_heads
        self.vocab_size, self.max_sequence_length = vocab_size, max_sequence_length
        self.embedding_dropout_prob = embedding_dropout_prob
        self.attention_dropout_prob = attention_dropout_prob
        self.output_dropout_prob = output_dropout_prob
        self.layernorm_epsilon, self.initializer_range = layernorm_epsilon, initializer_range
        self.hidden_act, self.pool_token = hidden_act, pool_token
        self.classifier_dropout = classifier_dropout
        if hidden_size % num_attention_heads != 0:
            raise ValueError(
                f"hidden_size: expected a multiple of the {num_attention_heads} heads, got "
                f"{hidden_size}"
            )
        super().__init__(**others)
        self.pad_token_id = pad_token_id

    @classmethod
    def of_size(cls, name: str, **changes: Any) -> "GLMConfig":
        """The configuration of a published size, with changes.

        Raises:
            ValueError: for another name than a key of SIZES.
        """
        if name not in SIZES:
            raise ValueError(f"name: expected one of {', '.join(SIZES)}, got {name!r}")
        fields = (
            "num_layers", "hidden_size", "num_attention_heads", "max_sequence_length", "vocab_size",
        )  # fmt: skip
        return cls(**{**dict(zip(fields, SIZES[name], strict=True)), **changes})
