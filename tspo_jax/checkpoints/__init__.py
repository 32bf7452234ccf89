"""safetensors <-> parameters; folders as things to call."""
