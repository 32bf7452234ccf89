"""The networks, one file each: pure functions of (parameters, arrays), without files, meshes or checkpoints."""
