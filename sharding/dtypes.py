"""Which dtypes go with quantized weights. Pure, and loads nothing: a config is checked by it."""


def dtype_beside(quantization: str | None, dtype: str) -> str:
    """Return what --dtype auto means beside such weights if it is `dtype` beside float ones.

    A product of int8 is a sum of whole numbers up to 127 x 127 x columns, and float16 ends at
    65,504: Keras has no int8 layer that computes in it.
    """
    return "float32" if (quantization, dtype) == ("int8", "float16") else dtype
