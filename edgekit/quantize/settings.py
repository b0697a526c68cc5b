"""What is chosen, by measurement on validation images, when a graph is quantized; the scheme is the runtime's wish."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """in_float: layers that stay float, by the names that `qdq.layers` gives."""

    in_float: tuple[str, ...] = ()
