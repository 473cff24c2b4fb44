"""A Hugging Face checkpoint directory -> a KerasHub preset directory.

KerasHub's own converters do the work; `families.py` says which model type becomes which backbone.
Weights are read only from safetensors, and no code is loaded from the directory. Imports Keras, so
`process.prepare_process` must be called first.
"""

from pathlib import Path

import keras_hub

from runner.common.errors import DataError, first_line
from runner.preset.families import FAMILIES, family_of_checkpoint
from runner.preset.json_files import read_json


def convert(checkpoint: Path, folder: Path, *, dtype: str) -> None:
    """Write backbone, tokenizer and preprocessor as a preset, without the head.

    The whole model is in memory during the conversion.

    Args:
        dtype: of the weights to write.

    Raises:
        DataError: the converter fails.
    """
    model_type = str(read_json(checkpoint / "config.json").get("model_type"))
    class_name = family_of_checkpoint(model_type)
    assert class_name is not None, "this is a bug: checkpoint_type rejects such checkpoints"
    models = keras_hub.models
    is_encoder = FAMILIES[class_name].classifier is not None
    preprocessors = models.TextClassifierPreprocessor if is_encoder else models.CausalLMPreprocessor
    try:
        backbone = models.Backbone.from_preset(str(checkpoint), dtype=dtype)
        preprocessor = preprocessors.from_preset(str(checkpoint))
    except Exception as error:  # a converter can raise anything
        raise DataError(
            f"KerasHub's converter for {model_type} does not accept {checkpoint}: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    backbone.save_to_preset(str(folder))
    preprocessor.save_to_preset(str(folder))
