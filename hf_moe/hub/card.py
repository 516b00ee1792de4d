# SPDX-License-Identifier: Apache-2.0
"""The model card of an upcycled model, rendered from what `hf_moe.json` says."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData


TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
PIPELINE_TAGS = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
}


def write_model_card(folder: Path, provenance: dict[str, Any], parent_card: Path | None = None) -> None:
    """
    Write `README.md` into the folder of an upcycled model.

    Args:
        folder (`Path`): The model's folder.
        provenance (`dict`): The content of its `hf_moe.json`.
        parent_card (`Path`, *optional*): The card of the dense model, whose licence and languages are taken over.
    """
    parent, result = provenance["parent"], provenance["result"]
    parent_data = ModelCard.load(parent_card).data if parent_card is not None and parent_card.exists() else None
    data = ModelCardData(
        license=getattr(parent_data, "license", None),
        license_name=getattr(parent_data, "license_name", None),
        license_link=getattr(parent_data, "license_link", None),
        language=getattr(parent_data, "language", None),
        library_name="transformers",
        pipeline_tag=next((tag for head, tag in PIPELINE_TAGS.items() if result["architecture"].endswith(head)), None),
        tags=["moe", "mixture-of-experts", "upcycled", "hf_moe"],
        # A name without an owner is a folder on somebody's disk; the Hub could not link it.
        base_model=parent["name"] if parent["revision"] else None,
        base_model_relation="finetune" if parent["revision"] else None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        provenance=provenance,
        parent=parent,
        result=result,
        recipe=provenance["recipe"],
        recipe_yaml=yaml.safe_dump(provenance["recipe"], sort_keys=False).strip(),
        parity=provenance["parity"],
        auto_class=_auto_class(result["architecture"]),
    )
    card.save(folder / "README.md")


def _auto_class(architecture: str) -> str:
    heads = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification")
    return "AutoModel" + next((head for head in heads if architecture.endswith(head)), "")
