"""The C kernels, which setup.cfg has no words for; everything else is there."""

from setuptools import Extension, setup

KERNELS = Extension(
    "data_pipeline.native._kernels", ["data_pipeline/native/kernels.c"], extra_compile_args=["-O3", "-std=c11"]
)
setup(ext_modules=[KERNELS])
