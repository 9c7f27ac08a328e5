"""What pyproject.toml cannot say: a wheel that carries compiled kernels is for one platform, whatever the Python.

scripts/build_wheels.sh puts the kernels into nexusengine/native/lib and names the platform in NEXUSENGINE_PLATFORM;
without it the wheel is for any platform, and the kernels are compiled where they are first used.
"""

import os

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel

PLATFORM = os.environ.get("NEXUSENGINE_PLATFORM")


class Package(Distribution):
    def has_ext_modules(self) -> bool:
        return bool(PLATFORM) or super().has_ext_modules()


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", PLATFORM) if PLATFORM else super().get_tag()


setup(distclass=Package, cmdclass={"bdist_wheel": Wheel})
