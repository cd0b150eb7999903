"""What other libraries need to know of quantized models: diffusers, transformers, PEFT."""
