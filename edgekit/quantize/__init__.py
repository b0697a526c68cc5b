"""An fp32 ONNX graph -> the int8 graph of a scheme: ranges from calibration images, weights that cannot saturate."""

from edgekit.quantize.qdq import Quantized, quantize
from edgekit.saturation import unsafe_pairs
from edgekit.quantize.scheme import SCHEMES, Scheme

__all__ = ["SCHEMES", "Quantized", "Scheme", "quantize", "unsafe_pairs"]
