"""From a model to a functional ATen graph, with everything that is needed to call it like the model."""
