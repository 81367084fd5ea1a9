"""Which stored dtypes hold weights, and why the others do not."""

NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "C64": "complex64",
    "C128": "complex128",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F4": "float4_e2m1fn_x2",
}
"""Names of dtypes in a safetensors header -> torch's."""

_WEIGHTS = frozenset({"float64", "float32", "float16", "bfloat16", "complex64", "complex128"})


def reason_unusable(dtype: str) -> str:
    """Return why a tensor of this dtype (torch's name) holds no weight that can be measured; "" where it does."""
    if dtype in _WEIGHTS:
        return ""
    if dtype == "bool":
        return "bool: a mask, not a weight"
    if dtype.startswith(("float8", "float4", "float6", "F8", "F6", "F4")):
        return f"{dtype}: low-precision codes whose scales are stored elsewhere or nowhere"
    if dtype.startswith(("q", "bits")):
        return f"{dtype}: quantised; the weights are codes times scales"
    if dtype.startswith(("int", "uint")):
        return f"{dtype}: integers (indices, counters, or quantised and packed weights)"
    return f"{dtype}: not a dtype that a norm is defined for"
