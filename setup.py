"""The C kernels, which setup.cfg has no words for; everything else is there."""

from glob import glob

from setuptools import Extension, setup

KERNELS = Extension(
    "data_pipeline.native._kernels",
    sorted(glob("data_pipeline/native/*.c")),
    depends=glob("data_pipeline/native/*.h"),
    extra_compile_args=["-O3", "-std=c11"],
    libraries=["m"],
)
setup(ext_modules=[KERNELS])
