"""Metadata and dependencies. Relay runs from its checkout: nothing of it is put into site-packages.

Its folders are called `utils` and `evaluate`; installed, they would shadow other people's.
"""

from setuptools import setup

GCS = ["gcsfs>=2026.3"]  # gs:// paths: 105 MB
TEST = ["pytest", "pytest-xdist", "gcp-storage-emulator>=2026.7"]

setup(
    name="relay-vision",
    version="0.1.0",
    description="MoCo-v2 pretraining, Faster R-CNN fine-tuning in rounds and COCO evaluation as a chain of Slurm jobs",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[],
    install_requires=[
        "torch>=2.9",
        "torchvision>=0.24",
        "submitit>=1.5.4",
        "pycocotools>=2.0.8",
        "hotcoco>=1.3",
        "opencv-python-headless>=4.10",
        "pyyaml>=6",
        "numpy>=1.26",
        "pillow>=10.1",
        "rich>=13",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "tensorboard>=2.18",
    ],
    extras_require={
        "gcs": GCS,
        "tpu": ["torch_xla[tpu]==2.9.*", "torch==2.9.*", "torchvision==0.24.*", *GCS],  # by `make install-tpu`
        "torch-tpu": ["torch-tpu>=0.2", "torch>=2.11", *GCS],  # what follows torch_xla; untested, see utils/device.py
        "test": TEST,
        "dev": [*TEST, *GCS, "ruff", "mypy", "import-linter", "types-PyYAML"],
    },
)
