# SPDX-License-Identifier: Apache-2.0
"""The model cards of upcycled and of edited models, rendered from what `hf_moe.json` says."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CardData, ModelCard, ModelCardData
from transformers.utils import logging


logger = logging.get_logger(__name__)


TEMPLATES = Path(__file__).parent / "templates"
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
    parent, result = provenance["parent"], provenance["result"]
    card = ModelCard.from_template(
        _metadata(provenance, parent_data, "upcycled"),
        template_path=str(TEMPLATES / "model_card.md"),
        provenance=provenance,
        parent=parent,
        result=result,
        experts=provenance.get("experts", []),
        other_licences=_other_licences(provenance),
        recipe=provenance["recipe"],
        recipe_yaml=yaml.safe_dump(provenance["recipe"], sort_keys=False).strip(),
        parity=provenance["parity"],
        auto_class=_auto_class(result["architecture"]),
    )
    card.save(folder / "README.md")


def write_edit_card(folder: Path, provenance: dict[str, Any], parent_data: CardData | None = None) -> None:
    """
    Write `README.md` into the folder of a model that was made by editing a mixture of experts.

    Args:
        folder (`Path`): The model's folder.
        provenance (`dict`): The content of its `hf_moe.json`.
        parent_data (`CardData`, *optional*): Metadata of the source's card: licence and languages are taken over.
    """
    given = {name: value for name, value in provenance["arguments"].items() if value is not None}
    card = ModelCard.from_template(
        _metadata(provenance, parent_data, "edited"),
        template_path=str(TEMPLATES / "edited_model_card.md"),
        provenance=provenance,
        parent=provenance["parent"],
        result=provenance["result"],
        measured=provenance["measured"],
        arguments_yaml=yaml.safe_dump(given, sort_keys=False).strip(),
        auto_class=_auto_class(provenance["result"]["architecture"]),
    )
    card.save(folder / "README.md")


def _metadata(provenance: dict[str, Any], parent_data: CardData | None, made_by: str) -> ModelCardData:
    parent, result, experts = provenance["parent"], provenance["result"], provenance.get("experts", [])
    if _other_licences(provenance):
        terms = {"license": "other", "license_name": "several", "license_link": None}
    else:
        terms = {field: getattr(parent_data, field, None) for field in ("license", "license_name", "license_link")}
    linked = [origin["name"] for origin in (parent, *experts) if origin["revision"]]
    sparse = ["moe", "mixture-of-experts"] if result["num_sparse_layers"] else []
    return ModelCardData(
        **terms,
        language=getattr(parent_data, "language", None),
        library_name="transformers",
        pipeline_tag=next((tag for head, tag in PIPELINE_TAGS.items() if result["architecture"].endswith(head)), None),
        tags=[*sparse, made_by, "hf_moe"],
        # A name without an owner is a folder on somebody's disk; the Hub could not link it.
        base_model=(list(dict.fromkeys(linked)) if experts else linked[0]) if linked else None,
        base_model_relation=("merge" if experts else "finetune") if linked else None,
    )


def _other_licences(provenance: dict[str, Any]) -> set[str]:
    """Licences of the checkpoints that gave experts, where they are not that of the parent."""
    return {expert["license"] for expert in provenance.get("experts", [])} - {provenance["parent"]["license"], None}


def _auto_class(architecture: str) -> str:
    return "AutoModel" + next((head for head in PIPELINE_TAGS if architecture.endswith(head)), "")
