"""GLM (2021), of which transformers has no model: "glm" and "glm4" there are GLM-4.

Importing this registers it with the auto classes of transformers.
"""

import transformers

from ptv2_fast.encoders.glm.configuration import SIZES, GLMConfig
from ptv2_fast.encoders.glm.inputs import BlankTokens, blank_inputs, blank_tokens
from ptv2_fast.encoders.glm.modeling import (
    GLMForConditionalGeneration,
    GLMForMultipleChoice,
    GLMForSequenceClassification,
    GLMForTokenClassification,
    GLMModel,
)

__all__ = [
    "SIZES",
    "BlankTokens",
    "GLMConfig",
    "GLMForConditionalGeneration",
    "GLMForMultipleChoice",
    "GLMForSequenceClassification",
    "GLMForTokenClassification",
    "GLMModel",
    "blank_inputs",
    "blank_tokens",
]

transformers.AutoConfig.register(GLMConfig.model_type, GLMConfig)
transformers.AutoModel.register(GLMConfig, GLMModel)
transformers.AutoModelForMultipleChoice.register(GLMConfig, GLMForMultipleChoice)
transformers.AutoModelForSequenceClassification.register(GLMConfig, GLMForSequenceClassification)
transformers.AutoModelForTokenClassification.register(GLMConfig, GLMForTokenClassification)
