# SPDX-License-Identifier: Apache-2.0
"""The model card of an upcycled model, rendered from what `hf_moe.json` says."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CardData, ModelCard, ModelCardData
from transformers.utils import logging


logger = logging.get_logger(__name__)


TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
PIPELINE_TAGS = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
}


def read_parent_card(path: Path) -> CardData | None:
    """The metadata of the dense model's card; None if there is no card, with a warning if it cannot be read."""
    if not path.exists():
        return None
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data
    except (ValueError, yaml.YAMLError) as error:
        logger.warning(f"The metadata of {path} cannot be read; licence and languages are not taken over. ({error})")
        return None


def licence(data: CardData | None) -> str | None:
    """What a card states as the licence; None if it states none."""
    name = getattr(data, "license", None)
    return getattr(data, "license_name", None) or name if name == "other" else name


def write_model_card(folder: Path, provenance: dict[str, Any], parent_data: CardData | None = None) -> None:
    """
    Write `README.md` into the folder of an upcycled model.

    Args:
        folder (`Path`): The model's folder.
        provenance (`dict`): The content of its `hf_moe.json`.
        parent_data (`CardData`, *optional*): Metadata of the dense model's card: languages are taken over, and the licence
            unless a checkpoint that gives experts states another one.
    """
    parent, result, experts = provenance["parent"], provenance["result"], provenance.get("experts", [])
    other_licences = {expert["license"] for expert in experts} - {parent["license"], None}
    if other_licences:
        terms = {"license": "other", "license_name": "several", "license_link": None}
    else:
        terms = {field: getattr(parent_data, field, None) for field in ("license", "license_name", "license_link")}
    linked = [origin["name"] for origin in (parent, *experts) if origin["revision"]]
    data = ModelCardData(
        **terms,
        language=getattr(parent_data, "language", None),
        library_name="transformers",
        pipeline_tag=next((tag for head, tag in PIPELINE_TAGS.items() if result["architecture"].endswith(head)), None),
        tags=["moe", "mixture-of-experts", "upcycled", "hf_moe"],
        # A name without an owner is a folder on somebody's disk; the Hub could not link it.
        base_model=(list(dict.fromkeys(linked)) if experts else linked[0]) if linked else None,
        base_model_relation=("merge" if experts else "finetune") if linked else None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        provenance=provenance,
        parent=parent,
        result=result,
        experts=experts,
        other_licences=other_licences,
        recipe=provenance["recipe"],
        recipe_yaml=yaml.safe_dump(provenance["recipe"], sort_keys=False).strip(),
        parity=provenance["parity"],
        auto_class=_auto_class(result["architecture"]),
    )
    card.save(folder / "README.md")


def _auto_class(architecture: str) -> str:
    return "AutoModel" + next((head for head in PIPELINE_TAGS if architecture.endswith(head)), "")
