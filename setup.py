"""What pyproject.toml cannot say: where the commands and experiments of a clone go in a wheel.

Below the package, so that no top-level `configs`, `decode` and `train` come into site-packages. An editable install
uses the folders of the clone.
"""

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

FOLDERS = ("configs", "decode", "train")


class BuildWithBundled(build_py):
    """Adds the folders to the packages of the wheel."""

    def finalize_options(self) -> None:
        """Extends what pyproject.toml lists."""
        super().finalize_options()
        packages = find_namespace_packages(include=[f"{folder}*" for folder in FOLDERS])
        self.packages = [*self.packages, *(f"dllm_jax.bundled.{package}" for package in packages)]
        self.package_dir = self.package_dir | {f"dllm_jax.bundled.{folder}": folder for folder in FOLDERS}


setup(cmdclass={"build_py": BuildWithBundled})
