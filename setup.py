from setuptools import setup

setup(
    name="ecg-language",
    version="0.1.0",
    description="ECG-language pretraining: ETP, MERL and FG-CLEP side by side",
    license="MIT",
    python_requires=">=3.10",
    py_modules=["data", "model", "train", "eval"],
    data_files=[("", ["prompts.json"])],
    install_requires=[
        "torch>=2.4", "numpy>=1.26", "scipy>=1.11", "pandas>=2.0", "wfdb>=4.1", "scikit-learn>=1.3", "matplotlib>=3.7",
        "tqdm>=4.65", "transformers>=4.56", "tokenizers>=0.20", "safetensors>=0.4",
    ],
    extras_require={"test": ["pytest>=8"]},
)
