"""Configuration: flags, the frozen EngineConfig, and how the first becomes the second."""
