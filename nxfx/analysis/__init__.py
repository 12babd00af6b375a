"""What is known of a graph's values without running it. Imports nothing of nxfx but ``graph``."""
