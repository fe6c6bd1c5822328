"""``python -m dsv4_jax.cli``: the ``dsv4`` command."""

from dsv4_jax.cli import main

main()
