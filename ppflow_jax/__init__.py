"""ppflow_jax: Pyramidal Patchification Flow (arXiv 2506.23543) and SiT in JAX.

Conventions everywhere: arrays are NHWC, time `t` runs from 0 (noise) to 1 (data).
"""
