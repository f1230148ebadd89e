"""The front end between HTTP or `LLM` and the engine: text, token ids, and the client of the engine cores."""
