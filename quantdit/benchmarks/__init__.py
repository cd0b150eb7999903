"""Speed: the CPU's and the GPU's products, exported graphs."""
