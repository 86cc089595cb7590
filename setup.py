"""The import package `kvpress` is assembled from four top-level folders; every folder with an `__init__.py` is a package."""

from pathlib import Path

from setuptools import setup

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


setup(packages=packages(), package_dir=ROOTS)
