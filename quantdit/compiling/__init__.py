"""The main job: from a pipeline and a recipe to a quantized folder."""
