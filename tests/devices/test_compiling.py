"""devices/compiling.py: the compiler's options; what it says of programs is in tests/tspo/test_ahead_of_time.py."""

import jax
import jax.numpy as jnp
import pytest

from tspo_jax.devices import compiling


def test_every_compiler_knows_the_options_of_all_platforms():
    """XLA reads them before it asks for a GPU, and refuses names that it does not know."""
    assert compiling.options("cpu") == compiling.options("tpu") == {} != compiling.options("gpu")
    x = jnp.eye(2)
    for options in compiling.OPTIONS.values():
        assert (jax.jit(lambda x: 2 * x, compiler_options=options)(x) == 2 * x).all()
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_no_such"):
        jax.jit(lambda x: 3 * x, compiler_options={"xla_gpu_no_such": True})(x)
