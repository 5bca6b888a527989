"""The wheel also has configs/ and launch/, which stand beside the package in the checkout."""

from setuptools import find_packages, setup

BESIDE = {"ppflow_jax.configs": "configs", "ppflow_jax.launch": "launch"}
setup(
    packages=[*find_packages(include=["ppflow_jax*"]), *BESIDE],
    package_dir=BESIDE,
    package_data={
        "ppflow_jax": ["py.typed"],
        "ppflow_jax.serve": ["page.html"],
        "ppflow_jax.launch": ["*"],
    },
)
