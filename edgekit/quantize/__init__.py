"""An fp32 ONNX graph -> the int8 graph of a scheme: ranges from calibration images, weights that cannot saturate."""

from edgekit.quantize.qdq import Quantized, layers, quantize
from edgekit.quantize.scheme import SCHEMES, Scheme
from edgekit.quantize.settings import Settings
from edgekit.quantize.slim import slim
from edgekit.saturation import unsafe_pairs

__all__ = ["SCHEMES", "Quantized", "Scheme", "Settings", "layers", "quantize", "slim", "unsafe_pairs"]
