"""Everything about the distribution is in settings.ini; this file only hands it to setuptools."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent
_parser = ConfigParser(delimiters=["="], interpolation=None)
_parser.read(HERE / "settings.ini", encoding="utf-8")
cfg = _parser["DEFAULT"]


def requirement_list(key: str) -> list[str]:
    return [line.strip() for line in cfg.get(key, "").splitlines() if line.strip()]


extras = {key.removesuffix("_extra").replace("_", "-"): requirement_list(key)
          for key in cfg if key.endswith("_extra")}

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"],
    author=cfg["author"], author_email=cfg["author_email"],
    keywords=cfg["keywords"].split(), license="Apache-2.0", license_files=["LICENSE"],
    python_requires=">=" + cfg["min_python"],
    packages=find_namespace_packages(include=["fsdl_devinfra", "fsdl_devinfra.*"]), include_package_data=True, zip_safe=False,
    install_requires=requirement_list("requirements"), extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split(),
                  "pytest11": ["fsdl-devinfra=fsdl_devinfra.env.pytest_plugin"],  # a line on the environment in pytest's header
                  "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
    long_description=(HERE / "README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Developers", "Intended Audience :: Science/Research",
                 "Natural Language :: English", "Operating System :: POSIX :: Linux", "Operating System :: MacOS",
                 *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13, 14)),
                 "Topic :: Scientific/Engineering :: Artificial Intelligence", "Typing :: Typed"],
)
