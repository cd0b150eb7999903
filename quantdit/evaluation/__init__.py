"""A quantized model compared with its original: samples of both, their measures, a report, and the gate."""
