"""The import package `kvpress` is assembled from four top-level folders: every folder with an `__init__.py` is a
package.

The native CPU kernels are an optional extension: where no compiler is at hand the install goes on without them.
"""

from pathlib import Path

from setuptools import Extension, setup

ROOTS = {
    "kvpress": "kvpress",
    "kvpress.policies": "policies",
    "kvpress.kernels": "kernels",
    "kvpress.longbench": "longbench",
}


def packages() -> list[str]:
    found = []
    for package, folder in ROOTS.items():
        for init in sorted(Path(folder).rglob("__init__.py")):
            found.append(".".join([package, *init.parent.relative_to(folder).parts]))
    return found


NATIVE = Path("kernels/native")
native = Extension(
    "kvpress.kernels.native._native",
    sources=sorted(str(path) for path in NATIVE.glob("*.cpp")),
    depends=sorted(str(path) for path in NATIVE.glob("*.hpp")),
    define_macros=[("Py_LIMITED_API", "0x030B0000")],
    py_limited_api=True,
    extra_compile_args=[
        "-O2",  # vectors are written out: -O3 only doubles the time to compile
        "-ftree-vectorize",
        "-fvect-cost-model=dynamic",
        "-std=c++17",
        "-fopenmp",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=fast",
        "-Wno-psabi",
    ],
    extra_link_args=["-fopenmp"],
    optional=True,
)

setup(
    packages=packages(),
    package_dir=ROOTS,
    package_data={"": ["*.pyi", "*.json", "*.j2"]},
    ext_modules=[native],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
