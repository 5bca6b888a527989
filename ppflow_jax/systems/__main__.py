"""Write docs/systems.md to standard output."""

from ppflow_jax.systems.catalogue import page

if __name__ == "__main__":
    print(page(), end="")
