"""Where the checkpoint is."""

from __future__ import annotations

from pathlib import Path

from fastdeploy.errors import ConfigError

N_FILES_SHOWN = 12


def model_folder(name: str) -> Path:
    """The checkpoint folder; raises ConfigError that tells what was looked for and what is there."""
    if not name:
        raise ConfigError("--model: required; give a checkpoint folder (`fastdeploy demo-model` builds a small one)")
    folder = Path(name).expanduser().absolute()
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ConfigError(
            f"--model {name}: {folder} {what}; give a local folder with config.json, the tokenizer and *.safetensors "
            "(models are not fetched by name)"
        )
    if not (folder / "config.json").is_file():
        names = sorted(entry.name for entry in folder.iterdir())
        shown = ", ".join(names[:N_FILES_SHOWN]) + (", ..." if len(names) > N_FILES_SHOWN else "")
        raise ConfigError(f"--model {name}: no config.json in {folder}; it holds {shown or 'nothing'}")
    return folder
