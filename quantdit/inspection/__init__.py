"""What is inside a quantized folder: `inspection.inspect` reads it, the rest shows it."""
