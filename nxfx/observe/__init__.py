"""The model run eagerly, and watched: every place where a tensor's value reaches Python, a shape or the host."""
