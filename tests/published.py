"""What published checkpoints hold: their keys and shapes, read off the files themselves."""
import json
from pathlib import Path


def published_keys(name: str) -> dict[str, list[int]]:
    "The keys of a published checkpoint and their shapes."
    return json.loads((Path(__file__).parent/"published_keys"/f"{name}.json").read_text(encoding="utf-8"))
