"""GLM (2021) and its heads, as models of transformers.

"GLM: General Language Model Pretraining with Autoregressive Blank Infilling" (Du et al., ACL 2022),
whose 2B and 10B are models of P-Tuning v2's paper. Written from the published formulas; not
transformers' "glm", which is GLM-4.
"""

import os
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from ptv2_fast.encoders.attention_hook import ATTENTION_NAME, RowMask
from ptv2_fast.encoders.glm.checkpoints import fill_from_checkpoint
from ptv2_fast.encoders.glm.configuration import GLMConfig
from ptv2_fast.encoders.glm.inputs import read_mask
from ptv2_fast.encoders.glm.layers import GLMStack


class GLMPreTrainedModel(PreTrainedModel):
    """Makes, loads and saves every model of this file."""

    config: GLMConfig
    config_class = GLMConfig
    base_model_prefix = "glm"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLMBlock"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _input_embed_layer = "word_embeddings"

    @classmethod
    def from_checkpoint(
        cls, path: str | os.PathLike, config: GLMConfig, dtype: torch.dtype | None = None
    ) -> "GLMPreTrainedModel":
        """A model with published weights, in eval mode; parts that the file lacks are new.

        Tensors are read one by one into a model that has `dtype` already, so that both need the
        memory of one model.

        Args:
            path: a file of THUDM ("mp_rank_00_model_states.pt") or of the code on the hub
                (pytorch_model.bin, model.safetensors, with or without an index of shards), or the
                folder that holds it. No code in it runs.
            config: of the size that the file has.
            dtype: of the weights; None = float32.

        Raises:
            ValueError: for a file that cannot be read, or that holds another size or another
                model, naming the first tensor that differs.
        """
        with torch.device("meta"):
            model = cls(config)
        nn.Module.to(model, dtype or torch.float32).to_empty(device="cpu")
        for name in fill_from_checkpoint(model, path):
            linear = cast(nn.Linear, model.get_submodule(name))
            nn.init.normal_(linear.weight, std=config.initializer_range)
            nn.init.zeros_(linear.bias)
        return model.eval()


class GLMModel(GLMPreTrainedModel):
    """The backbone: embeddings of words and two positions, layers, a norm."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.transformer = GLMStack(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        context_lengths: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """The states of all tokens, [B, T, hidden].

        Without `context_lengths` every token sees every other that is no padding, as an encoder's
        do. The published code takes no mask to mean a causal one instead, with which the first
        token, that classifiers read, would see itself alone: that is `context_lengths=0`.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T], 0 for padding. As in the published code, integers [B] or one
                integer stand for `context_lengths`.
            position_ids: int64 [B or 1, 2, T]: the position, and that inside of a block (piece);
                None = 0, 1, ... and 0.
            inputs_embeds: [B, T, hidden], instead of `input_ids`.
            context_lengths: the length of part A ("sep"), integers [B] or one for all: token j is
                visible to token i if j <= i or j < context_lengths.
            output_hidden_states: of all layers as well; None = as the configuration says.

        Raises:
            ValueError: for a mask or positions of another shape, more tokens than positions, and
                the published code's memory of states (`mems`).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: expected these or inputs_embeds, got both or neither")
        if kwargs.pop("mems", None) is not None:
            raise ValueError("mems: expected None, got a memory of states, which is not served")
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        visible = read_mask(attention_mask, context_lengths, words.shape[:2], words.device)
        if self.config._attn_implementation == ATTENTION_NAME:
            mask: Any = RowMask(visible.tokens, context_lengths=visible.context_lengths)
        else:
            mask = visible.as_added(words.shape[1], words.dtype)
        hidden = self._embed(words, position_ids)
        states = [hidden]
        for layer in self.transformer.layers:
            hidden = layer(hidden, mask, **kwargs)
            states.append(hidden)
        hidden = states[-1] = self.transformer.final_layernorm(hidden)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BaseModelOutput(
            last_hidden_state=hidden,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def _embed(self, words: Tensor, position_ids: Tensor | None) -> Tensor:
        parts, (batch, length) = self.transformer, words.shape[:2]
        if position_ids is None:
            if length > self.config.max_sequence_length:
                raise ValueError(
                    f"input_ids: expected at most {self.config.max_sequence_length} tokens, got "
                    f"{length}"
                )
            position = torch.arange(length, device=words.device)[None]
            block = torch.zeros_like(position)
        elif position_ids.shape[1:] != (2, length) or len(position_ids) not in (1, batch):
            raise ValueError(
                f"position_ids: expected shape [B, 2, T] = {[batch, 2, length]}, the positions of "
                f"tokens and those in their block, got {list(position_ids.shape)}"
            )
        else:
            position, block = position_ids.unbind(dim=1)
        positions = parts.position_embeddings(position) + parts.block_position_embeddings(block)
        return parts.embedding_dropout(words + positions)


class _GLMWithHead(GLMPreTrainedModel):
    """A backbone and the dropout of a head."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        self.glm = GLMModel(config)
        given = config.classifier_dropout
        self.dropout = nn.Dropout(config.output_dropout_prob if given is None else given)


class _GLMClassifier(_GLMWithHead):
    """Reads the first token: dropout, a layer with tanh, dropout, a layer."""

    def __init__(self, config: GLMConfig, outputs: int) -> None:
        super().__init__(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, outputs)
        self.post_init()

    def _classify(self, states: Tensor) -> Tensor:
        first = self.dropout(torch.tanh(self.dense(self.dropout(states[:, 0]))))
        return self.out_proj(first)


class GLMForSequenceClassification(_GLMClassifier):
    """Labels of a text, or a number with one label."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config, cast(int, config.num_labels))
        self.num_labels = config.num_labels

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits [B, num_labels], and a loss with `labels` [B]; the rest as `GLMModel`."""
        outputs = self.glm(
            input_ids, attention_mask, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits, loss = self._classify(outputs.last_hidden_state), None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states
        )


def _flat(given: Any) -> Any:
    """What belongs to each choice, [B, choices, ...], without the dimension of choices."""
    return given.flatten(0, 1) if isinstance(given, Tensor) and given.dim() > 1 else given


class GLMForMultipleChoice(_GLMClassifier):
    """Which of several texts is right, by a number for each."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config, 1)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        context_lengths: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput:
        """Logits [B, choices], and a loss with `labels` [B].

        Tensors have a dimension for the choices behind the first one: input_ids [B, choices, T].
        """
        tokens = inputs_embeds if input_ids is None else input_ids
        if tokens is None or tokens.dim() < 3:
            shape = None if tokens is None else list(tokens.shape)
            raise ValueError(f"input_ids: expected shape [B, choices, T], got {shape}")
        flat = map(_flat, (input_ids, attention_mask, position_ids, inputs_embeds, context_lengths))
        outputs = self.glm(*flat, return_dict=True, **kwargs)
        logits = self._classify(outputs.last_hidden_state).view(tokens.shape[:2])
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states
        )


class GLMForTokenClassification(_GLMWithHead):
    """Labels of tokens."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.classifier = nn.Linear(config.hidden_size, cast(int, config.num_labels))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Logits [B, T, num_labels], and a loss with `labels` [B, T]; the rest as `GLMModel`."""
        outputs = self.glm(
            input_ids, attention_mask, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits, loss = self.classifier(self.dropout(outputs.last_hidden_state)), None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, config=self.config)
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class GLMForConditionalGeneration(GLMPreTrainedModel):
    """The language model's head, which is the table of words: logits of a forward, no generation.

    Blanks are filled behind the text, so that positions and lengths are needed (`blank_inputs`).
    """

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        self.glm = GLMModel(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits [B, T, vocab_size] of the token behind each; arguments as `GLMModel`."""
        outputs = self.glm(
            input_ids, attention_mask, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits = nn.functional.linear(outputs.last_hidden_state, self.glm.word_embeddings.weight)
        return MaskedLMOutput(logits=logits, hidden_states=outputs.hidden_states)
