"""Metadata and dependencies. Relay runs from its checkout: nothing of it is put into site-packages.

Its folders are called `utils` and `evaluate`; installed, they would shadow other people's.
"""

from setuptools import setup

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
        "pillow>=10",
    ],
    extras_require={
        "gcs": ["gcsfs>=2026.3"],  # gs:// paths: 105 MB
        "dev": [
            *["pytest", "pytest-xdist", "ruff", "mypy", "import-linter", "types-PyYAML"],
            *["gcsfs>=2026.3", "gcp-storage-emulator>=2026.7"],
        ],
    },
)
