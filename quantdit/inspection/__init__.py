"""What is inside a quantized folder."""
