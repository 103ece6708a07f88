"""Push a trained model to the Hugging Face hub: scripts/push.py runs/NAME --hub_model_id user/name"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs.errors import UserError
from configs.names import check_text


def push_folder(folder: Path, repository: str) -> str:
    """Upload best/ (weights, config.json, card) in one commit; a line with its address."""
    from huggingface_hub import HfApi

    if not (folder / "model.safetensors").is_file():
        raise UserError("there is no model to push", where=str(folder), fix="give a run folder, or its best/ folder")
    try:
        api = HfApi()
        name = api.create_repo(repository, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=["model.safetensors", "config.json", "README.md"],
            commit_message="Upload model",
        )
    except Exception as error:  # of the network or the hub; the model lies safe in its folder
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise UserError(
            f"the hub did not take the model: {first_line}",
            where=repository,
            fix=f"log in with `hf auth login`, then: python scripts/push.py {folder} --hub_model_id {repository}",
        ) from None
    return f"pushed    {commit.commit_url}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="push.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="a run folder or a best/ folder")
    parser.add_argument("--hub_model_id", required=True, help="user/name")
    arguments = parser.parse_args(argv)
    from scripts.report import fail

    try:
        best = arguments.run / "best"
        check_text("hub_model_id", arguments.hub_model_id)
        print(push_folder(best if best.is_dir() else arguments.run, arguments.hub_model_id))
        return 0
    except Exception as error:
        return fail(error, debug=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
