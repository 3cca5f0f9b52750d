"""What pyproject.toml cannot say: ``kernels/`` is a second source folder, and ``conf/`` ships as ``hipexp/_conf``."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["hipexp", "hipexp.*"]), *find_packages("kernels"), "hipexp._conf"],
    package_dir={"hipexp._conf": "conf", "hipexp_kernels": "kernels/hipexp_kernels"},
    package_data={"hipexp._conf": ["*.yaml", "*/*.yaml"], "hipexp.needle": ["model/*"], "hipexp.report": ["assets/*"]},
)
