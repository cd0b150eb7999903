"""A quantized weight, the transform of its input and the description of a layer: data, no modules."""
