"""Where `quant_layers` was before it had a package; scripts that import it from here go on."""

from quantdit.checkpoints.checkpoint import quant_layers

__all__ = ["quant_layers"]
