"""An fp32 ONNX graph -> the int8 graph of a scheme: ranges from calibration images, weights that cannot saturate."""

from edgekit.quantize.choice import CANDIDATES, Evidence, Measured, select
from edgekit.quantize.qdq import BEFORE, FLOATS, Quantized, layers, quantize
from edgekit.quantize.scheme import SCHEMES, Scheme
from edgekit.quantize.settings import Settings
from edgekit.quantize.slim import slim
from edgekit.saturation import unsafe_pairs

__all__ = [
    "BEFORE",
    "CANDIDATES",
    "FLOATS",
    "SCHEMES",
    "Evidence",
    "Measured",
    "Quantized",
    "Scheme",
    "Settings",
    "layers",
    "quantize",
    "select",
    "slim",
    "unsafe_pairs",
]
