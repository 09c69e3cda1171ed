"""What pyproject.toml cannot say: the commands and experiments of a clone go into the wheel below the package.

So that no top-level `configs`, `decode` and `train` come into site-packages.
"""

from setuptools import find_namespace_packages, setup

FOLDERS = ("configs", "decode", "train")
BUNDLED = find_namespace_packages(include=[f"{folder}*" for folder in FOLDERS])

setup(
    packages=[*find_namespace_packages(include=["dllm_jax*"]), *(f"dllm_jax.bundled.{name}" for name in BUNDLED)],
    package_dir={f"dllm_jax.bundled.{folder}": folder for folder in FOLDERS},
)
